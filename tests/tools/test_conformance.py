"""The conformance table: what was measured of the peers; docs must follow if one is mended."""

import importlib.util

import pytest

from dist_vse import cli
from dist_vse.tools.verify.conformance.command import table
from dist_vse.tools.verify.conformance.measure import (
    EXACT,
    Measured,
    by_stage,
    completed,
    failed,
    measure,
    measure_uneven,
)
from dist_vse.tools.verify.conformance.peers import settings
from dist_vse.tools.verify.conformance.zero import measure_zero
from tests.support.distributed import run_distributed


def _found(peer: str) -> dict[str, Measured]:
    return {measured.label: measured for measured in measure([peer])}


def _ours() -> tuple[dict[str, Measured], list[str]]:
    return _found("dist_vse"), [measure_uneven("dist_vse", number) for number in range(2)]


def _needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'dist_vse[examples]'")


@pytest.mark.slow
def test_ours_is_exact_in_all_columns() -> None:
    found, uneven = run_distributed(_ours, 2)[0]
    assert uneven == ["exact", "exact"]
    for measured in found.values():
        assert measured.exact and measured.temperature is not None
        assert measured.reductions == 1
    assert found["cached_step"].replayed is True
    assert not failed(list(found.values()))
    assert len(table(list(found.values()), 2).rows) == 2
    off = completed(found["cached_step"], "exact", [EXACT, "factor 0.5000, 5e-01", EXACT, EXACT])
    assert failed([off]) and not failed([completed(off, "exact", [EXACT] * 4)])


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_open_clips_flags(world_size: int) -> None:
    _needs("open_clip")
    found = run_distributed(_found, world_size, "open_clip", timeout=100)[0]
    default = found["local_loss=False, gather_with_grad=False"]
    assert default.towers.factor == pytest.approx(1 / world_size, rel=1e-5)
    assert default.temperature is not None and default.temperature.exact
    assert found["local_loss=True, gather_with_grad=False"].towers.error > 0.05
    assert found["local_loss=False, gather_with_grad=True"].exact
    assert found["local_loss=True, gather_with_grad=True"].exact
    accumulated = found["local_loss=True, gather_with_grad=True, accum_freq=3"]
    assert accumulated.towers.exact and accumulated.replayed is False
    assert accumulated.temperature is not None
    assert accumulated.temperature.factor == pytest.approx(3, rel=1e-5)


@pytest.mark.slow
def test_sentence_transformers_is_exact_where_it_gathers() -> None:
    _needs("sentence_transformers")
    found = run_distributed(_found, 2, "sentence_transformers", timeout=100)[0]
    for label, measured in found.items():
        assert measured.exact == label.endswith("gather_across_devices=True"), label


@pytest.mark.slow
def test_grad_caches_distributed_loss_gives_a_share() -> None:
    _needs("gradcache")
    found = run_distributed(_found, 2, "grad_cache", timeout=100)[0]
    assert found["DistributedContrastiveLoss"].towers.factor == pytest.approx(0.5, rel=1e-5)
    assert all(measured.replayed for measured in found.values())


def _zero(peers: list[str]) -> dict[str, list[str]]:
    return {
        f"{peer} {setting.label}": measure_zero(peer, number)
        for peer in peers
        for number, setting in enumerate(settings(peer))
        if "=False" not in setting.label and not setting.own_loop
    }


@pytest.mark.slow
def test_under_zero_ours_is_exact_and_caches_of_others_are_not() -> None:
    _needs("sentence_transformers")
    _needs("gradcache")
    peers = ["dist_vse", "sentence_transformers", "grad_cache"]
    found = run_distributed(_zero, 2, peers, timeout=110)[0]
    ranking = "sentence_transformers {}MultipleNegativesRankingLoss, gather_across_devices=True"
    assert found["dist_vse GlobalContrastiveLoss"] == [EXACT] * 4
    assert found["dist_vse cached_step"] == [EXACT] * 4
    assert found[ranking.format("")] == [EXACT] * 4
    assert found[ranking.format("Cached")] == ["fails: AssertionError"] * 4
    refused, one, two, three = found["grad_cache DistributedContrastiveLoss"]
    assert refused == "fails: RuntimeError"  # DeepSpeed wants its own backward there
    assert one == two != three and EXACT not in (one, three)


def test_stages_with_one_verdict_stand_together() -> None:
    assert by_stage([EXACT] * 4) == EXACT and by_stage([]) == "-"
    assert by_stage(["fails: A", "off", "off", EXACT]) == "0: fails: A; 1, 2: off; 3: exact"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "1"], "error: --processes 1: peers are compared on 2 or more"),
        (["run.yaml"], "error: --peer all takes no config; leave run.yaml out"),
    ],
)
def test_a_slip_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert cli.main(["verify", *arguments, "--peer", "all"]) == 2
    assert capsys.readouterr().err.startswith(message)
