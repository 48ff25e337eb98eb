"""The documentation runs, page by page, and names everything that is public."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import vpd_lens
from vpd_lens import errors

DOCS = Path(__file__).parents[1] / "docs"
NO_RUN = "<!-- no-run -->"
FENCE = re.compile(r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$", re.M | re.S)


class Block(NamedTuple):
    """A code block and the line it begins on."""

    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that are run: all but those below a `<!-- no-run -->` line."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1].strip()
        if before != NO_RUN:
            line = text.count("\n", 0, match.start("code"))
            found.append(Block(line, textwrap.dedent(match["code"])))
    return found


PAGES = [page for page in sorted(DOCS.rglob("*.md")) if blocks(page)]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, one thread and no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


# Runs of a few steps look like failed ones, and say so.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_python_block_runs(page: Path, scratch: Path, undrawn: None) -> None:
    namespace = {"__name__": "docs"}
    for block in blocks(page):
        # Blank lines in front, so that a traceback names the line of the page.
        source = "\n" * block.line + block.code
        exec(compile(source, str(page), "exec", dont_inherit=True), namespace)


# What takes minutes (training, pruning, attacks) is cut; other tests run it.
SMALLER = {
    "steps=20_000": "steps=2, batch_size=2, faithfulness={'warmup_steps': 2}",
    "max_new_tokens=20": "max_new_tokens=2",
    ', prune="adversarial"': "",
    '"held_out/"': '"corpus/", n_batches=1, batch_size=2, pgd_steps=()',
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::vpd_lens.training.log.TrainingWarning")
def test_the_readme_runs_from_top_to_bottom(scratch: Path) -> None:
    (page,) = blocks(DOCS.parent / "README.md")
    code = "\n" * page.line + page.code
    for whole, small in SMALLER.items():
        assert whole in code, whole
        code = code.replace(whole, small)
    save_python_model(scratch / "path/or/name")
    (scratch / "corpus").mkdir()
    (scratch / "corpus/lines.txt").write_text("def train(self, model):\n    return model\n" * 60)
    exec(compile(code, "README.md", "exec", dont_inherit=True), {"__name__": "docs"})


def save_python_model(folder: Path) -> None:
    """A random two-layer model whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([*letters, "<end>"])}
    of_bytes = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    of_bytes.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    of_bytes.decoder = decoders.ByteLevel()
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=24,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=of_bytes, bos_token="<end>", eos_token="<end>", pad_token="<end>"
    ).save_pretrained(folder)


EXECUTED = re.compile(r'^```python exec="true"[^\n]*\n(?P<code>.*?)^```$', re.M | re.S)


def test_what_the_pages_print_depends_on_the_repository_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks that the site's build executes read stored records, never a run of the builder's."""
    monkeypatch.chdir(DOCS.parent)
    for page in DOCS.rglob("*.md"):
        code = [match["code"] for match in EXECUTED.finditer(page.read_text(encoding="utf-8"))]
        assert not any("runs/" in block for block in code), page
        exec(compile("\n".join(code), str(page), "exec", dont_inherit=True), {})


def api_pages() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))


@pytest.mark.parametrize("name", vpd_lens.__all__)
def test_every_public_name_is_in_the_api_pages(name: str) -> None:
    assert re.search(rf"^::: vpd_lens\.(\w+\.)*{name}$", api_pages(), re.M), name


ERRORS = [
    name
    for name, kind in vars(errors).items()
    if inspect.isclass(kind) and issubclass(kind, errors.VPDError)
]


@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_in_the_api_and_explained(name: str) -> None:
    assert f"::: vpd_lens.errors.{name}" in api_pages()
    assert f"`{name}`" in (DOCS / "errors.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_message_that_is_explained_exists() -> None:
    """`…` on the page and whatever a message is filled with stand for anything."""
    texts = []
    for path in Path(vpd_lens.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                texts.append("".join(map(str, parts)))
    written = "\n".join(" ".join(text.split()) for text in texts)
    page = " ".join((DOCS / "errors.md").read_text(encoding="utf-8").split())
    for explained in re.findall(r"\*\*(.+?)\*\*", page):
        for message in re.findall("`([^`]* [^`]*)`", explained):
            parts = filter(None, map(re.escape, re.split("…|\\.\\.\\.", message)))
            assert re.search(".*?".join(parts), written), message


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
def test_documented_members_exist(page: Path) -> None:
    """An explicit `members:` list must not name what was renamed or removed."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^::: ([\w.]+)\n((?: {4}.*\n?)*)", text, re.M):
        target = resolve(match[1])
        for member in re.findall(r"^ {8,}- (\w+)$", match[2], re.M):
            assert hasattr(target, member) or member in inspect.get_annotations(target), (
                f"{match[1]} has no {member}"
            )


def resolve(path: str) -> object:
    """The object that a dotted path names."""
    import importlib

    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            target = getattr(target, part)
        return target
    raise AssertionError(f"{path} cannot be imported")
