"""The model of a run, for whoever trains it, scores it, draws with it, counts its operations or traces it on paper."""

from models.peers import ALONE, Peers
from models.pretraining import PretrainingModel, build_model
from trainer.config.run import RunConfig


def assemble_model(config: RunConfig, *, peers: Peers = ALONE) -> PretrainingModel:
    """Encoder and objectives with fresh weights from torch's global generator; the encoder is frozen where the run does not train it."""
    model = build_model(config.encoder, config.objectives, config.token_grid, cameras=config.cameras, peers=peers)
    if not config.optim.train_encoder:
        model.freeze_encoder()
    return model
