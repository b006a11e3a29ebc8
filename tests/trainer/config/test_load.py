"""Reading a run config: every shipped one loads, and every kind of mistake is a sentence that names its key."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainer.config.load import dump_run_config, load_run_config, run_config_schema
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
TINY = ROOT / "launch" / "runs" / "croco_video_tiny.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_run_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path)
    written = tmp_path / "config.yaml"
    written.write_text(dump_run_config(config))
    assert load_run_config(written) == config


def test_the_issue_sizes_are_all_shipped() -> None:
    forms = {f"croco_{form}_{size}" for form in ("image", "video") for size in ("base", "large", "giant")}
    assert forms | {"croco_video_tiny", "croco_keyframe"} <= {path.stem for path in SHIPPED}


def test_overrides_reach_nested_keys_and_list_items() -> None:
    config = load_run_config(TINY, ["optim.lr=3e-4", "objectives[0].mask.ratio=0.5", "data.val_split=null"])
    assert (config.optim.lr, config.objectives[0].mask.ratio, config.data.val_split) == (3e-4, 0.5, None)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean lr?"),
        ("zzz=1", "zzz: unknown key; there are schema_version, seed, steps"),
        ("optim.lr=fast", "optim.lr: .*valid number.*'fast'"),
        ("optim.lr=-1", "optim.lr: .*greater than 0.*-1"),
        ("steps=0", "steps: .*greater than or equal to 1"),
        ("schema_version=2", "schema_version: .*found 2"),
        ("data.clip.height_px=100", "height_px is 100, which encoder.patch_px 16 does not divide; set it to 96 or 112"),
        ("data.clip.frames=5", "frames is 5, which encoder.tubelet_frames 2 does not divide"),
        ("data.kind=waymo", "data: .*'nuscenes', 'synthetic', 'shards', 'image_pairs'"),
        ("data.clip.frames=null", "data.clip.frames: .*integer"),
        ("objectives[0].kind=dino", "objectives.0"),
        ("objectives=[{kind: depth, near_m: 90}]", r"objectives\.0: near_m 90"),
        ("objectives[0].mask.ratio=1.0", "objectives.0.mask.ratio: .*less than 1"),
        ("objectives[0].mask.ratio=0.0001", "hides 0; at least one must be hidden"),
        ("objectives=[]", "objectives: .*at least 1 item"),
        ("parallel.micro_batch=5", "global_batch is 16, which parallel.micro_batch 5 does not divide"),
        ("optim.warmup_steps=999999", "warmup_steps is 999999, longer than the 800 steps"),
        ("data.timeout_s=600", r"data\.timeout_s is 600, not below the parallel\.timeout_s of 600"),
        ("observe.hang_least_s=300", r"data\.timeout_s is 300, not below the observe\.hang_least_s of 300"),
        ("observe={metrics_port: null, pushgateway: 'http://gate:9091'}", "metrics_port is none, so there is no summary"),
        ("observe.pushgateway=gate:9091", "pushgateway: .*match pattern"),
        ("observe.wandb={mode: offline}", "wandb.project: .*required"),
        ("observe.tensorboard=runs", "tensorboard: .*boolean"),
        ("data.pairs.min_overlap=0.99", "min_overlap 0.99 is not below max_overlap"),
        ("data.augment.crop_share=[0.9,0.5]", "crop_share .* is not 0 < least <= most <= 1"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("observe.metrics_port=70000", "metrics_port: .*less than or equal to 65535"),
        ("data.root=s3://bucket/city", "s3://bucket/city is no folder; data in a store is packed first"),
        ("data.cameras=CAM_FRONT", r"data.cameras: takes a list, found 'CAM_FRONT'; write it in brackets"),
        ("optim.learning=3", "optim.learning: unknown key; there are lr, "),
        ("optim.lr", "'optim.lr' is not key=value"),
        ("=3", "'=3' is not key=value"),
        ("objectives[7].weight=2", "do not fit"),
        ("steps=${nowhere}", "do not fit"),
        ("objectives=[{kind: depth}]", "depth, is asked of single images; set it to 1"),
        ("objectives=[{kind: depth, near_m: 90}]", "near_m 90.0 is not below far_m 80.0"),
        ("optim={train_encoder: false, ema_decay: 0.9}", "every average is the weight itself"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_run_config(TINY, [override])


def test_wandb_s_files_for_later_need_a_folder() -> None:
    offline = "observe.wandb={project: odonata, mode: offline}"
    assert load_run_config(TINY, [offline]).observe.wandb is not None
    with pytest.raises(ConfigError, match=r"run\.uri is s3://bucket/run; set the mode to online"):
        load_run_config(TINY, [offline, "run.uri=s3://bucket/run"])


def test_a_decoder_is_taken_only_where_one_is_wanted() -> None:
    warm = "warm_start={uri: runs/base, parts: encoder_and_decoder}"
    assert load_run_config(TINY, [warm]).warm_start is not None
    with pytest.raises(
        ConfigError, match="no objective of mae has CroCo's decoder, as croco, pose and flow have; set it to encoder"
    ):
        load_run_config(TINY, [warm, "objectives=[{kind: mae}]"])


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(TINY, ["optim.lr=fast", "encoder.size=enormous"])
    assert "optim.lr" in str(caught.value)
    assert "encoder.size" in str(caught.value)


def test_a_missing_file_names_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*croco_video_tiny\.yaml"):
        load_run_config(TINY.with_name("croco_vidio_tiny.yaml"))


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "just words", "\x00"])
def test_a_file_that_is_not_a_mapping_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_run_config(path)


def test_a_missing_required_key_says_how_to_give_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("schema_version: 1\nsteps: 5\n")
    with pytest.raises(ConfigError, match="global_batch: required and not given; set it in the file or as global_batch="):
        load_run_config(path)


def test_every_field_says_what_turning_it_does() -> None:
    import json

    schema = json.loads(run_config_schema())
    described = {"run", "data", "clip", "augment", "pairs", "encoder", "optim", "parallel", "checkpoint", "store", "observe"}
    described |= {"kind", "mask", "warm_start"}
    sections = {"RunConfig": schema, **schema["$defs"]}
    silent = [
        f"{section}.{key}"
        for section, body in sections.items()
        for key, field in body.get("properties", {}).items()
        if "description" not in field and key not in described
    ]
    assert silent == []


def test_odonata_config_needs_no_torch_and_prints_the_resolved_run() -> None:
    code = (
        "import sys; from odonata import door; sys.argv = ['odonata', 'config', sys.argv[1], 'optim.lr=3e-4']\n"
        "try: door.main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'odonata config imported torch'"
    )
    done = subprocess.run([sys.executable, "-c", code, str(TINY)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "lr: 0.0003" in done.stdout


def test_a_wrong_entry_of_a_list_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(TINY, ["objectives[0].mask.ratio=2"])
    (problem,) = str(caught.value).splitlines()[1:]
    assert "mask.ratio" in problem


def test_an_override_of_the_kind_of_data_leaves_behind_what_the_file_says_of_its_own(tmp_path: Path) -> None:
    packed = ("data.kind=shards", "data.datasets=[{uri: packed}]", "store.region=eu-west-1")
    config = load_run_config(TINY, packed)
    assert config.data.kind == "shards" and config.data.datasets[0].uri == "packed"
    assert config.data.clip == load_run_config(TINY).data.clip
    assert config.data.store.region == "eu-west-1", "packed data is reached like the run"
    assert load_run_config(TINY, (*packed, "data.store.region=us-east-1")).data.store.region == "us-east-1"
    with pytest.raises(ConfigError, match=r"data\.root: unknown key; there are (?!.*root).*datasets"):
        load_run_config(TINY, (*packed, "data.root=somewhere"))
