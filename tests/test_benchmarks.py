"""The scripts of `benchmarks` measure what they say, and notice what they should notice."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
modules = ("commits", "evaluation", "pairs", "step")
commits, evaluation, pairs, step = map(importlib.import_module, modules)


def test_ratios_are_of_pairs():
    """A machine that is ten times slower in one round says nothing about the ratio."""
    found = pairs.ratio([2.0, 40.0, 6.0], [1.0, 20.0, 3.0])
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0}


# ------------------------------------------------------------------ commits


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository of the package, in two commits: the second reports half of the total."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path / "repository"
    for folder in ("vpd_lens", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    path = root / "vpd_lens" / "training" / "step.py"
    source = path.read_text()
    changed = source.replace('["total"] = torch', '["total"] = 0.5 * torch')
    assert changed != source
    git(root, "init", "--quiet")
    commit(root, "whole")
    path.write_text(changed)
    commit(root, "half")
    monkeypatch.setattr(commits, "ROOT", root)
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(["git", *identity, *arguments], cwd=root, stdout=-1, check=True)
    return done.stdout.decode()


def commit(root: Path, message: str) -> None:
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--no-gpg-sign", "--message", message)


SETTINGS = {
    "configuration": "XS",
    "model": "hooked_transformer",
    "changes": {"optimiser.lr": 1e-2},
    "weights": None,
    "threads": 1,
}


@pytest.mark.slow  # two processes import everything
def test_two_commits_are_told_apart_by_their_losses_only(repository: Path):
    result = commits.measure(["HEAD~1", "HEAD"], SETTINGS, rounds=3)
    found = result["loss_difference"]["all_steps"]
    # What is trained is the same, to the bit; what is reported is not.
    assert found.pop("total") == pytest.approx(0.5)
    assert set(found.values()) == {0.0}
    assert {"stochastic", "adversarial", "grad_norm/importance"} <= found.keys()
    assert result["memory_ratio"] == pytest.approx(1, abs=0.01)
    assert 0.1 < result["ratio"]["low"] <= result["ratio"]["median"] < 10
    assert set(result["phases"]) == set(step.PHASES)
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_a_checkout_holds_its_commit_and_is_gone_after_an_interruption(repository: Path):
    trees = []

    def interrupted():
        with commits.checkout("HEAD~1") as (name, tree):
            trees.append(tree)
            assert name == git(repository, "rev-parse", "--short", "HEAD~1").strip()
            assert "0.5 * torch" not in (tree / "vpd_lens/training/step.py").read_text()
            assert len(git(repository, "worktree", "list").splitlines()) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not trees[0].exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1


def test_what_is_in_the_working_tree_is_named_after_its_commit(repository: Path):
    head = git(repository, "rev-parse", "--short", "HEAD").strip()
    with commits.checkout(None) as (name, tree):
        assert (name, tree) == (f"the working tree, {head}", repository)
    (repository / "vpd_lens" / "py.typed").write_text("changed")
    git(repository, "add", "--all")
    with commits.checkout(None) as (name, _):
        assert name == f"the working tree, {head}-dirty"


def test_a_side_that_cannot_start_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(commits, "WORKER", tmp_path / "nothing.py")
    side = commits.Side("abc1234", tmp_path, SETTINGS)
    with pytest.raises(SystemExit, match="abc1234: its process ended"):
        side.ask("step")
    side.close()


def test_unknown_commits_and_folders_without_git_are_explained(
    repository: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SystemExit, match="rev-parse"), commits.checkout("nowhere"):
        pass
    shutil.rmtree(repository / ".git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    with pytest.raises(SystemExit, match="not a git repository"), commits.checkout("HEAD"):
        pass


# --------------------------------------------------------------- evaluation


def test_the_parts_of_an_evaluation_compute_what_the_evaluation_reports():
    model = step.build("XS", "bridge")
    stepper = step.stepper_for("XS", model, step.preset("XS"))
    (batch,) = step.batches("XS", None, 1)
    stepper.step(batch, 0)
    clock = evaluation.Clock()
    found = evaluation.parts(model, batch, clock)
    report = evaluation.whole(model, batch)
    assert found.pop("l0") == report.l0["0"]["total"]
    assert found.pop("pgd") == report.pgd["20"]["mean"]
    kl = {name: mode["kl"] for name, mode in report.modes.items() if name != "target"}
    assert found == kl
    assert set(clock.ms) > {f"masks: {name}" for name in kl}


def test_evaluation_adds_its_parts_up():
    result = evaluation.measure("XS", "hooked_transformer", None, rounds=2)
    shares = {name: part["share"] for name, part in result["parts"].items()}
    assert shares.pop(evaluation.SUM) == 1
    shares.pop(evaluation.WHOLE)
    shares.pop(evaluation.FORWARD)
    # The median of two rounds is their mean, and means of shares add up.
    assert sum(shares.values()) == pytest.approx(1)
    assert result["parts"][evaluation.FORWARD]["forwards"]["median"] == 1
