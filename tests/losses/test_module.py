"""The loss as a module: in wrapped models, compiled, in half precision, and wrongly used."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from dist_vse import GlobalContrastiveLoss, LossOptions, UserError
from dist_vse.losses.dense_loss import dense_loss
from dist_vse.losses.registry import LOSSES
from tests.support.distributed import run_distributed
from tests.support.paths import ROOT
from tests.support.toy_towers import make_pairs, make_towers, rows_of_rank


def _features(count: int, width: int = 6) -> tuple[Tensor, Tensor]:
    made = torch.randn(2, count, width, generator=torch.Generator().manual_seed(0))
    images, texts = functional.normalize(made, dim=2).unbind()
    return images, texts


class _WithLoss(nn.Module):
    """A model that holds its loss, so that one wrapper is around both."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.towers, self.loss = make_towers(), GlobalContrastiveLoss(name)

    def forward(self, **pairs: Tensor) -> Any:
        return self.loss(*self.towers(**pairs))


def _on_two_ranks() -> dict[str, Any]:
    rank, pairs = dist.get_rank(), make_pairs(16)
    own = rows_of_rank(pairs, [9, 7], rank)
    found: dict[str, Any] = {"grads": {}, "errors": {}}
    for name in ("info_nce", "siglip"):
        inside = _WithLoss(name)
        value = DistributedDataParallel(inside)(**own)
        value.backward()
        towers, beside = make_towers(), GlobalContrastiveLoss(name)
        beside(*DistributedDataParallel(towers)(**own)).backward()
        for place, loss in (("inside", inside.loss), ("beside", beside)):
            grads = {n: p.grad for n, p in loss.named_parameters()}
            found["grads"][name, place] = grads
        found["grads"][name, "value"] = value.detach()
        same = zip(inside.towers.parameters(), towers.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in same)  # type: ignore[arg-type]
    loss, (images, texts) = GlobalContrastiveLoss("convse"), _features(3, 6 - rank)
    whole = _features(3)
    wrong: dict[str, Any] = {
        "width": (images, texts),
        "length": (whole[0] * (1 + rank), whole[1]),
        "integers": (whole[0].long(), whole[1].long()) if rank else whole,
    }
    for what, features in wrong.items():
        with pytest.raises(UserError) as error:
            loss(*features)
        found["errors"][what] = str(error.value)
    leaves = [x.clone().requires_grad_() for x in whole]
    with pytest.raises(UserError) as error:
        torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    found["errors"]["create_graph"] = str(error.value)
    with torch.no_grad():
        found["no_grad"] = loss(*whole)
    return found


def test_on_two_ranks_its_scalars_are_exact_and_slips_are_one_error() -> None:
    first, second = run_distributed(_on_two_ranks, 2)
    for name in ("info_nce", "siglip"):
        towers, loss = make_towers(), GlobalContrastiveLoss(name)
        features = towers(**make_pairs(16))
        exact = dense_loss(name, *features, loss.log_scale, loss.bias, LossOptions())
        exact.backward()
        for rank in (first, second):
            for place in ("inside", "beside"):
                grads = rank["grads"][name, place]
                assert grads.keys() == dict(loss.named_parameters()).keys()
                for part, parameter in loss.named_parameters():
                    torch.testing.assert_close(grads[part], parameter.grad, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(rank["grads"][name, "value"], exact.view(()))
    assert first["errors"] == second["errors"]
    assert "embedding is 6 on rank 0 and 5 on rank 1" in first["errors"]["width"]
    assert "on rank 1 one's length is off by 1: use" in first["errors"]["length"]
    assert "must be of a floating type (on rank 1)" in first["errors"]["integers"]
    assert "has no second derivative" in first["errors"]["create_graph"]
    assert torch.equal(first["no_grad"], second["no_grad"])


@pytest.mark.parametrize("name", LOSSES)
def test_it_learns_what_the_loss_depends_on(name: str) -> None:
    loss = GlobalContrastiveLoss(name)
    features = [x.requires_grad_() for x in _features(8)]
    loss(*features).backward()
    learned = dict(loss.named_parameters())
    assert ("log_scale" in learned) == (name not in ("vse0", "vse++"))
    assert ("bias" in learned) == (name == "siglip")
    assert all(p.grad is not None and p.grad.abs() > 0 for p in learned.values())
    assert set(loss.state_dict()) == set(learned)
    assert not list(GlobalContrastiveLoss(name, learned=False).parameters())
    assert float(loss.stats["temperature"]) == pytest.approx(0.07)


def test_the_models_own_scale_takes_the_place_of_its() -> None:
    loss, features = GlobalContrastiveLoss("info_nce"), _features(8)
    scale = torch.tensor(20.0, requires_grad=True)
    value = loss(*features, scale)
    exact = functional.cross_entropy(20 * features[0] @ features[1].T, torch.arange(8))
    exact = exact + functional.cross_entropy(20 * features[1] @ features[0].T, torch.arange(8))
    torch.testing.assert_close(value, exact / 2)
    value.backward()
    assert scale.grad is not None and loss.log_scale.grad is None


def test_half_precision_and_a_second_backward() -> None:
    loss = GlobalContrastiveLoss("info_nce")
    exact = loss(*_features(8))
    with torch.autocast("cpu", torch.bfloat16):
        halves = [x.bfloat16().requires_grad_() for x in _features(8)]
        value = loss(*halves)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=0.02)
    value.backward(retain_graph=True)
    first = halves[0].grad
    assert first is not None and first.dtype == torch.bfloat16
    kept = first.clone()
    value.backward()  # where the graph was kept, it is as good as the first
    assert torch.equal(first, 2 * kept)
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()


def test_compiled_it_breaks_the_graph_and_no_more() -> None:
    towers, loss, pairs = make_towers(), GlobalContrastiveLoss("siglip"), make_pairs(8)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    def step(images: Tensor, texts: Tensor) -> Tensor:
        value: Tensor = loss(*towers(images, texts))
        return value * 2

    value = torch.compile(step, backend=backend)(**pairs)
    torch.testing.assert_close(value, step(**pairs))
    value.backward()
    assert len(graphs) == 2  # the towers, and what follows the loss
    assert loss.log_scale.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "info_nec"}, "loss='info_nec' is unknown; did you mean 'info_nce'?"),
        ({"temperature": 0.0}, "temperature (0.0) must be above 0"),
        ({"options": LossOptions(transport="star")}, "transport 'star' is unknown"),
    ],
)
def test_a_slip_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        GlobalContrastiveLoss(**arguments)
    assert message in str(error.value)


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_imports_no_torch() -> None:
    assert _run("import sys, dist_vse; print('torch' in sys.modules)") == "False"


@pytest.mark.slow
def test_the_loss_and_caching_need_torch_alone() -> None:
    heavy = ("deepspeed", "timm", "transformers", "omegaconf", "yaml", "PIL", "cv2", "webdataset")
    code = (
        "import sys, dist_vse as d\n"
        "d.GlobalContrastiveLoss, d.cached_step, d.retrieval_metrics\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert _run(code) == "[]"
