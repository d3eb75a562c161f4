"""FSDP2 over the blocks, in processes of their own with gloo: the loss and the gradients of the plain model."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

SHARDED = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from vit_model import ViTConfig, build_model

rank, world, port, recomputes = (int(argument) for argument in sys.argv[1:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
config = ViTConfig(resolution=32, patch_size=8, width=32, depth=3, mlp_dim=48, num_heads=2, num_registers=1)
models = [build_model(config, 5, "mlp", seed=0).train() for _ in range(2)]
plain, sharded = models
for model in models:
    torch.nn.init.normal_(model.head.out.weight, generator=torch.Generator().manual_seed(1))
mesh = init_device_mesh("cpu", (world,))
for block in sharded.blocks:
    fully_shard(block, mesh=mesh)
fully_shard(sharded, mesh=mesh)
sharded.activation_checkpointing = bool(recomputes)
generator = torch.Generator().manual_seed(2)
images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.tensor([0, 1, 2, 3])
mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
loss = torch.nn.functional.cross_entropy(plain(images, tokens=False).logits, labels)
loss.backward()
share = torch.nn.functional.cross_entropy(sharded(images[mine], tokens=False).logits, labels[mine])
share.backward()  # FSDP takes the mean over ranks
total = share.detach() / world
dist.all_reduce(total)
torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
count = 0
for (name, expected), parameter in zip(plain.named_parameters(), sharded.parameters(), strict=True):
    assert parameter.to_local().numel() <= -(-expected.shape[0] // world) * expected[0].numel(), name
    difference = (parameter.grad.full_tensor() - expected.grad).abs().max()
    # Halves of a batch are summed in another order; the bias of keys has no gradient but rounding.
    assert difference <= 1e-5 * expected.grad.abs().max() + 1e-7, (name, difference)
    count += 1
print("equal", count)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(("world", "recomputes"), [(1, 0), (2, 1)])
def test_sharded_blocks_give_the_loss_and_gradients_of_the_plain_model(world, recomputes):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, *(str(value) for value in (rank, world, port, recomputes))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        for process in ranks:
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error[-3000:]
            assert int(out.split("equal")[1]) > 40
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
