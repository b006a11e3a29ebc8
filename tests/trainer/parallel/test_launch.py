"""What the environment of a process says about its place and its engine, read from accelerate's real config files."""

from pathlib import Path

import pytest
import yaml

from trainer.config.training import ParallelConfig
from trainer.errors import ConfigError
from trainer.parallel.launch import Launch, Mesh, is_peer_loss, micro_steps, read_launch

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "launch" / "accelerate").glob("*.yaml"))


def environ_of(name: str, monkeypatch: pytest.MonkeyPatch, *changes: str, world_size: int | None = None) -> dict[str, str]:
    """The environment that `accelerate launch --config_file name.yaml` gives its workers, made by accelerate itself."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    path = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    port = ("--main_process_port", "0")
    args = launch_command_parser().parse_args(["--config_file", str(path), *port, *changes, "-m", "odonata"])
    args, _, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ""  # which of its own fields accelerate is to write into the JSON
    environ = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    monkeypatch.chdir(ROOT)  # DeepSpeed's JSON is named from there
    world = world_size or yaml.safe_load(path.read_text())["num_processes"]
    environ |= {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for key, value in environ.items():
        monkeypatch.setenv(key, value)
    return environ


def test_a_process_started_by_hand_is_alone() -> None:
    launch = read_launch({}, ParallelConfig())
    assert (launch.rank, launch.world_size, launch.engine, launch.precision) == (0, 1, "single", "fp32")


def test_torchrun_gives_ddp() -> None:
    launch = read_launch({"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, ParallelConfig())
    assert (launch.rank, launch.local_rank, launch.world_size, launch.engine) == (3, 1, 4, "ddp")


@pytest.mark.parametrize(
    ("name", "engine", "mesh"),
    [
        ("ddp", "ddp", Mesh(2, 1)),
        ("fsdp2", "fsdp2", Mesh(1, 2)),
        ("hsdp", "fsdp2", Mesh(2, 2)),
        ("zero1", "zero1", Mesh(1, 2)),
        ("zero2", "zero2", Mesh(1, 2)),
        ("zero3", "zero3", Mesh(1, 2)),
    ],
)
def test_every_shipped_accelerate_config_gives_its_engine(
    name: str, engine: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = read_launch(environ_of(name, monkeypatch), ParallelConfig())
    assert (launch.engine, launch.mesh, launch.reshard_after_forward) == (engine, mesh, True)


def test_all_shipped_accelerate_configs_are_tested() -> None:
    assert {path.stem for path in CONFIGS} == {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}


def test_mixed_precision_comes_from_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = environ_of("fsdp2", monkeypatch, "--mixed_precision", "bf16")
    assert read_launch(environ, ParallelConfig()).precision == "bf16"
    with pytest.raises(ConfigError, match="fp32 and accelerate's mixed_precision is bf16"):
        read_launch(environ, ParallelConfig(precision="fp32"))


def test_fp16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="mixed_precision fp16"):
        read_launch(environ_of("ddp", monkeypatch, "--mixed_precision", "fp16"), ParallelConfig())


def test_fsdp1_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="fsdp_version: 2"):
        read_launch(environ_of("fsdp2", monkeypatch, "--fsdp_version", "1"), ParallelConfig())


def test_a_mesh_that_is_not_the_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"2 replicas x 2 shards .* 8 processes started"):
        read_launch(environ_of("hsdp", monkeypatch, world_size=8), ParallelConfig())


def test_the_world_that_started_must_be_the_one_asked_for() -> None:
    with pytest.raises(ConfigError, match="asks for 8 processes and 1 started"):
        read_launch({}, ParallelConfig(world_size=8))


def launch_of(world_size: int) -> Launch:
    return Launch(0, 0, world_size, world_size, "ddp", "fp32", Mesh(world_size, 1), True)


def test_micro_steps_make_up_the_global_batch() -> None:
    assert micro_steps(launch_of(4), ParallelConfig(), 16) == (4, 1)
    assert micro_steps(launch_of(4), ParallelConfig(micro_batch=2), 16) == (2, 2)


@pytest.mark.parametrize(("world_size", "micro_batch", "batch"), [(3, None, 16), (32, None, 16), (2, 3, 16)])
def test_a_world_that_does_not_divide_the_batch_is_refused(world_size: int, micro_batch: int | None, batch: int) -> None:
    with pytest.raises(ConfigError, match=f"global_batch is {batch}, which {world_size} processes"):
        micro_steps(launch_of(world_size), ParallelConfig(micro_batch=micro_batch), batch)


def test_an_error_of_gloo_is_a_lost_peer_and_ours_is_not() -> None:
    assert is_peer_loss(RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"))
    assert not is_peer_loss(RuntimeError("shape mismatch"))
    assert not is_peer_loss(ValueError("gloo"))
