"""The plan of a run against independent counts, and against what a step really takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from flax import nnx
from torch.utils.flop_counter import FlopCounterMode

import bootpig_jax.train
from bootpig_jax.checkpoints.diffusers import load_unet
from bootpig_jax.errors import UserError
from bootpig_jax.kernels import PLAIN
from bootpig_jax.models.blocks import conv3x3
from bootpig_jax.training import accelerators
from bootpig_jax.training.accelerators import ACCELERATORS, slice_shape
from bootpig_jax.training.flops import count_flops, peak_flops
from bootpig_jax.training.plan import GIB, Plan
from tests.tiny_models import save_tiny_model, torch_unet

ROOT = Path(__file__).parents[1]
SD21_BASE = ROOT / "configs" / "models" / "stable-diffusion-2-1-base"
UNUSED = [f"{name}=unused" for name in ("output_dir", "data.dir", "model.base")]


def test_flops_of_a_unet_are_pytorchs_count(tmp_path):
    ours = load_unet(save_tiny_model(tmp_path / "model", "sd21base") / "unet")
    jaxpr = jax.make_jaxpr(lambda *arguments: ours(*arguments)[0])(
        jnp.zeros((2, 8, 8, 4)), jnp.zeros(2, jnp.int32), jnp.zeros((2, 5, 24))
    )
    theirs = torch_unet("sd21base")
    theirs.set_attn_processor(AttnProcessor())  # PyTorch does not count its fused one on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        theirs(torch.zeros(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, 5, 24))
    assert count_flops(jaxpr) == counter.get_total_flops()


@pytest.mark.parametrize("side", [2, 8], ids=["few positions", "many positions"])
def test_flops_of_a_convolution_and_its_gradients(side):
    graph, state = nnx.split(conv3x3(24, 32, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))

    def total(state: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(x).sum()

    gradients = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(
        state, jnp.zeros((2, side, side, 24))
    )
    assert count_flops(gradients) == 3 * 2 * (2 * side * side) * 9 * 24 * 32


def test_flops_multiply_loops_and_devices_out():
    a = jnp.zeros((3, 4))

    def once(x: jax.Array) -> jax.Array:
        return x @ a.T @ a  # 2 (m 4 3) twice

    def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return once(x), None

    assert count_flops(jax.make_jaxpr(once)(jnp.zeros((5, 4)))) == 2 * 2 * 5 * 4 * 3
    looped = jax.make_jaxpr(lambda x: jax.lax.scan(body, x, length=7)[0])(jnp.zeros((5, 4)))
    assert count_flops(looped) == 7 * 2 * 2 * 5 * 4 * 3
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.shard_map(once, mesh=mesh, in_specs=spec, out_specs=spec)
    assert count_flops(jax.make_jaxpr(mapped)(jnp.zeros((16, 4)))) == 2 * 2 * 16 * 4 * 3
    # Half of what a stride of 2 puts between the gradients are zeros, in each direction.
    gradient = jax.make_jaxpr(
        jax.grad(
            lambda x: jax.lax.conv_general_dilated(
                x,
                jnp.zeros((3, 3, 2, 5)),
                (2, 2),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            ).sum()
        )
    )(jnp.zeros((1, 8, 8, 2)))
    forward = 2 * 4 * 4 * 5 * 3 * 3 * 2
    assert count_flops(gradient) == 2 * forward


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("cpu", None),
    ],
)
def test_peaks_are_found_by_the_kind_of_device(kind, teraflops):
    assert peak_flops(kind) == (None if teraflops is None else teraflops * 1e12)


@pytest.mark.parametrize(
    ("name", "count", "shape"),
    [
        ("v5e", 1, (1, 1)),
        ("v6e", 8, (4, 2)),
        ("v5e", 16, (4, 4)),
        ("v5p", 4, (2, 2, 1)),
        ("v5p", 16, (4, 2, 2)),
        ("v5p", 512, (8, 8, 8)),
    ],
)
def test_a_slice_of_tpus_is_as_near_to_a_cube_as_can_be(name, count, shape):
    assert slice_shape(ACCELERATORS[name], count) == shape


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "4"], "--devices: only together with --plan"),
        (["--accelerator", "v5e"], "--accelerator: only together with --plan"),
        (["--plan", "--devices", "0"], "--devices: must be at least 1"),
        (["--plan", "--accelerator", "v5p", "--devices", "12"], "TPU v5p .* powers of 2, not 12"),
        (["--plan", "--accelerator", "v6e"], "TPU v6e is the package libtpu.*`make libtpu`"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments, said, monkeypatch):
    monkeypatch.setattr(accelerators.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=said):
        bootpig_jax.train.main([*arguments, *UNUSED])


def simulated(arguments: list[str], takes: int, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Plans with 8 devices as pretended ones and with a step that takes `takes` bytes."""
    asked = {}

    def plan(config, dtype, mesh, kernels):
        asked.update(dtype=dtype, devices=mesh.size, kernels=kernels)
        return Plan(0, 0, 0, 0, takes, {"peak": takes}, 8 * 0.35 * 989e12, mesh.size)

    monkeypatch.setattr(bootpig_jax.train, "plan", plan)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # JAX has its devices already
    common = ["--plan", *UNUSED, "batch_size=8"]
    bootpig_jax.train.main([*common, *arguments])
    return asked


@pytest.mark.parametrize(("takes", "verdict"), [(60, "fits"), (61, "exceeds")])
def test_a_plan_for_a_gpu_is_an_estimate(takes, verdict, monkeypatch, capsys):
    """In bfloat16, with plain attention: cuDNN's can't be compiled here, a CPU's is no estimate."""
    arguments = ["--accelerator", "h100", "--devices", "8"]
    asked = simulated(arguments, takes * GIB, monkeypatch)
    assert asked == {"dtype": jnp.bfloat16, "devices": 8, "kernels": PLAIN}
    out = capsys.readouterr().out
    assert "On each of 8 devices, GiB (estimated: compiled for a CPU, with plain attention)" in out
    assert f"It {verdict} NVIDIA H100 80 GB, which has 60.00 GiB for a program." in out
    assert out.splitlines()[-1].split() == ["NVIDIA", "H100", "80", "GB", "1.0000"]


def test_without_a_name_every_accelerators_time_is_estimated(monkeypatch, capsys):
    assert simulated(["--devices", "8"], 1, monkeypatch)["kernels"] is PLAIN
    out = capsys.readouterr().out
    assert "estimated: compiled for a CPU" in out and "NVIDIA A100" in out and "TPU v4" in out


def test_the_devices_that_are_here_plan_for_themselves(monkeypatch, capsys):
    asked = simulated([], 1, monkeypatch)
    assert asked == {"dtype": jnp.float32, "devices": 8, "kernels": None}
    assert "On each of 8 devices, GiB (compiled for cpu)" in capsys.readouterr().out


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    bootpig_jax.train.main(["--plan", "output_dir=unused", "data.dir=unused", *arguments])
    lines = capsys.readouterr().out.splitlines()
    return {line[2:46].strip(): float(line[46:]) for line in lines if line.startswith("  ")}


@pytest.mark.long
def test_the_command_prints_a_plan_and_trains_nothing(model_folder, capsys, tmp_path):
    arguments = [f"model.base={model_folder}", "data.image_size=16", "batch_size=8"]
    plan = planned(capsys, *arguments, "precision=float32")
    assert plan["together"] > plan["optimiser"] > plan["trained weights, float32"] > 0
    assert "NVIDIA H100" in plan
    assert not Path("unused").exists()


TAKES = """
import gc, json, re, sys
from pathlib import Path
import jax, jax.numpy as jnp
from bootpig_jax.config import TrainConfig
from bootpig_jax.kernels import kernels_for
from bootpig_jax.training import plan as planning
from bootpig_jax.training.sharding import make_mesh
from bootpig_jax.yaml_config import load_config

def resident(kind):
    return int(re.search(kind + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

config = load_config(TrainConfig, None, sys.argv[1:])
mesh = make_mesh(config.mesh)
step, arguments = planning.abstract_step(config, jnp.dtype("float32"), mesh, kernels_for())
compiled = step.lower(*arguments).compile()
expected = planning.plan(config, jnp.dtype("float32"), mesh)
gc.collect()
before = resident("VmRSS")
def zeros(leaf):
    return jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
state, frozen, batch = (jax.tree.map(zeros, tree) for tree in arguments)
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
for _ in range(2):
    state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready((state, metrics))
print(json.dumps([expected.peak, resident("VmHWM") - before]))
"""


@pytest.mark.long
def test_the_planned_memory_is_what_a_step_takes(tmp_path):
    """A UNet of SD 2.1's shape, a quarter as wide, at 32x32 latents, on this CPU."""
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        (tmp_path / name).mkdir()
        for file in (SD21_BASE / name).iterdir():
            sizes = json.loads(file.read_text())
            if name == "unet":
                sizes |= {
                    "block_out_channels": [96, 192, 384, 384],
                    "attention_head_dim": [2, 4, 8, 8],
                }
            (tmp_path / name / file.name).write_text(json.dumps(sizes))
    arguments = ["output_dir=x", "data.dir=x", "data.image_size=256", "batch_size=4"]
    result = subprocess.run(
        [sys.executable, "-c", TAKES, f"model.base={tmp_path}", *arguments],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    planned, measured = json.loads(result.stdout)
    print(f"planned {planned / 2**30:.2f} GiB, measured {measured / 2**30:.2f} GiB")
    assert planned == pytest.approx(measured, rel=0.1)
