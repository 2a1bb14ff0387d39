"""Text that every machine with this project's environment already has, for the demo model.

Two corpora, both in a deterministic order and without a download:

* [`pretraining_documents`]: prose (docstrings, long string constants, comment blocks) and a smaller share of source
  code from Python's standard library and from the installed packages this project depends on, with the packages'
  READMEs and licences. Files are found on disk and parsed with `ast`; nothing is imported or executed.
* [`task_documents`]: Python's language reference as shipped in `pydoc_data.topics`, split by topic into training and
  held-out text. None of its paragraphs is in the pre-training corpus.

Run as a script, this prints the size of each part.
"""

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from pydoc_data.topics import topics

PACKAGES = (  # those that are installed are read
    "accelerate anyio bitsandbytes click datasets dill filelock fsspec h11 httpcore httpx huggingface_hub jinja2"
    " mpmath multiprocess networkx numpy packaging pandas peft pip psutil pyarrow pygments regex rich safetensors"
    " setuptools sympy tokenizers torch torchgen tqdm transformers trl typer yaml"
)
SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "dist-packages", "pydoc_data", "lib2to3"}
SKIPPED_FOLDERS |= {"_vendor", "turtledemo", "encodings", "lexers", "idle_test", "__pycache__"}
HELD_OUT_PERCENT = 30  # of the topics; without what training topics share, that is about 13 % of the text
MAX_PACKAGE = 5_000_000  # characters of prose from one package, so that none dominates
MAX_CODE = 4_000_000  # characters of source code, from the standard library
SHINGLE = 8  # words
SHARED_SHINGLES = 0.3  # a paragraph with a greater share of known shingles counts as known


def paragraphs(text: str) -> list[str]:
    """Splits text at blank lines, keeping the indentation and line breaks inside each paragraph."""
    return [part.rstrip() for part in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").strip("\n")) if part.strip()]


def fingerprint(paragraph: str) -> bytes:
    """Hashes the lower-case words, so that paragraphs that differ only in names, numbers and layout are the same."""
    words = re.findall(r"\b[a-z]+\b", paragraph) or paragraph.split()
    return hashlib.sha256(" ".join(words).encode("utf-8", "replace")).digest()[:12]


def shingles(paragraph: str) -> set[str]:
    """Returns every run of `SHINGLE` words, which finds paragraphs that were edited or cut differently."""
    words = re.findall(r"\w+", paragraph.lower())
    return {" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}


def is_prose(paragraph: str, share: float = 0.8) -> bool:
    """Tells whether a paragraph reads as text: mostly letters and spaces, in ASCII, without very long lines."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    readable = paragraph.isascii() and max(map(len, paragraph.split("\n"))) <= 1000
    return readable and letters >= share * len(paragraph) and " " in paragraph.strip()


def strip_docstrings(tree: ast.Module) -> ast.Module:
    """Removes docstrings from a tree in place; they are in the prose already."""
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                node.body = rest or [ast.Pass()]
    return tree


def prose_of(source: str, tree: ast.Module, min_length: int = 100) -> str:
    """Collects the docstrings, long string constants and comment blocks of a module in the order of the file."""
    found = [
        (node.lineno, inspect.cleandoc(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= min_length
    ]
    for block in re.finditer(r"(?:^[ \t]*#(?: .*)?\n){2,}", source, re.MULTILINE):
        text = inspect.cleandoc(re.sub(r"^[ \t]*# ?", "", block.group(), flags=re.MULTILINE))
        if len(text) >= min_length and is_prose(text, 0.9):  # stricter: much of what is commented out is code
            found.append((source.count("\n", 0, block.start()) + 1, text))
    return "\n\n".join(text for _, text in sorted(found, key=lambda item: item[0]))


def modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yields the source and syntax tree of every module below a folder, in sorted order."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts[:-1]) and path.stat().st_size < 1_000_000:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # invalid escapes in other people's files
                    source = path.read_text(encoding="utf-8")
                    tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue
            yield source, tree


def package_folders() -> list[Path]:
    """Finds the installed packages of `PACKAGES` without importing them."""
    specs = map(importlib.util.find_spec, PACKAGES.split())
    return [Path(spec.submodule_search_locations[0]) for spec in specs if spec and spec.submodule_search_locations]


def package_texts() -> Iterator[str]:
    """Yields the README and the licence files of every installed distribution of `PACKAGES`."""
    for name in PACKAGES.split():
        try:
            dist = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        yield dist.metadata.get_payload() or dist.metadata.get("Description") or ""
        for file in sorted(dist.files or (), key=str):
            if re.search(r"dist-info/.*(LICEN[CS]E|COPYING|NOTICE)", str(file)):
                yield Path(dist.locate_file(file)).read_text(encoding="utf-8", errors="replace")


def in_stable_order(items: Iterable[str]) -> list[str]:
    """Shuffles by the hash of the text, which is the same on every machine and in every run."""
    return sorted(items, key=lambda text: hashlib.sha256(text.encode("utf-8", "replace")).digest())


def limited(documents: Iterable[str], size: int) -> Iterator[str]:
    """Yields documents up to a total number of characters."""
    for document in documents:
        size -= len(document)
        if size < 0:
            return
        yield document


class Filter:
    """Keeps the paragraphs that were not seen before, by fingerprint or by the share of shingles.

    Args:
        texts (`Iterable[str]`): The text whose paragraphs, and close variants of them, are to be left out.
    """

    def __init__(self, texts: Iterable[str]):
        texts = list(texts)
        self.seen = {fingerprint(part) for text in texts for part in paragraphs(text)}
        self.shingles = set().union(*map(shingles, texts))

    def known(self, paragraph: str) -> bool:
        """Tells whether a paragraph, or most of it, was in the texts or was kept before."""
        runs = shingles(paragraph)
        return fingerprint(paragraph) in self.seen or len(runs & self.shingles) > SHARED_SHINGLES * len(runs)

    def __call__(self, document: str, prose: bool = True) -> str:
        """Returns the document without known paragraphs and, if `prose`, without those that do not read as text."""
        parts = []
        for part in paragraphs(document):
            if (is_prose(part) or not prose) and not self.known(part):
                parts.append(part)
                self.seen.add(fingerprint(part))
        return "\n\n".join(parts)


def pretraining_documents() -> list[str]:
    """Returns the pre-training corpus: documents with the prose or the code of one module, READMEs and licences."""
    new = Filter(topics.values())
    stdlib = Path(sysconfig.get_path("stdlib"))
    documents = []
    for root in (stdlib, *package_folders()):
        prose = (new(prose_of(source, tree)) for source, tree in modules(root))
        documents += limited(in_stable_order(text for text in prose if len(text) >= 200), MAX_PACKAGE)
    documents += filter(None, map(new, package_texts()))
    code = (ast.unparse(strip_docstrings(tree)) for _, tree in modules(stdlib))
    documents += limited(in_stable_order(code), MAX_CODE)
    return in_stable_order(documents)


def task_documents() -> tuple[list[str], list[str]]:
    """Returns the training and the held-out text of the language reference, one document for each topic.

    Topics overlap. Each paragraph is kept in one topic only, and nothing that training text contains is held out.
    """
    held_out = {name for name in topics if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100 < HELD_OUT_PERCENT}
    train_names = sorted(set(topics) - held_out)
    new = Filter(())
    train = [new(topics[name], prose=False) for name in train_names]
    new = Filter(topics[name] for name in train_names)
    test = [new(topics[name], prose=False) for name in sorted(held_out)]
    return [text for text in train if len(text) >= 200], [text for text in test if len(text) >= 200]


def main() -> None:
    """Prints the number of documents and characters of each part."""
    train, held_out = task_documents()
    parts = {"pre-training": pretraining_documents(), "task, training": train, "task, held out": held_out}
    for name, documents in parts.items():
        print(f"{name}: {len(documents):,} documents, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
