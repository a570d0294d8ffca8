"""PyTorch for CPUs comes without Triton, and all that runs on a CPU works without it."""

import subprocess
import sys

CODE = """
import sys
sys.modules["triton"] = None  # as if it were not installed: every import of it raises

import torch
import florence_fast as ff

model, tokenizer = ff.create_model("florence_nano"), ff.get_tokenizer("florence_nano")
images, texts, scale = model(torch.rand(2, 3, 64, 64), tokenizer(["red apple", "violin"]))
loss = ff.ops.contrastive_loss(images, texts, scale)
loss.backward()
assert torch.isfinite(loss) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())

boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [8.0, 8.0, 9.0, 9.0]])
assert ff.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]

from florence_fast import info, provenance
import florence_fast.demo, florence_fast.train.engine, florence_fast.cli, florence_fast.export, florence_fast.warmup

assert "triton" not in {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
print("works")
"""


def test_models_losses_and_commands_work_where_triton_is_not_installed():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "works", done.stderr
