"""Caption metrics (BLEU, METEOR, ROUGE-L, CIDEr, SPICE) on any ground truth in the COCO caption format."""

import contextlib
import io
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metrics.ground_truth import GroundTruth, predictions_for, read_ground_truth
from utils import UserError

Captions = dict[int, list[str]]  # captions of an image, by its position in the ground truth
SCORERS = {"BLEU": "Bleu", "METEOR": "Meteor", "ROUGE_L": "Rouge", "CIDEr": "Cider", "SPICE": "Spice"}
# Numbers with a decimal point, and lower-casing as in English, whatever the user's locale is.
JAVA = ("java", "-Duser.language=en", "-Duser.country=US", "-Dfile.encoding=UTF-8")
ONE_IMAGE = "means nothing for one image, since it weighs words by the share of images whose references have them"
TOKENIZER_SECONDS = 900

# The PTB tokenizer's names of brackets are part of the published scores.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)+|(?:[a-z]\.){2,}|n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|\w+?(?=n't\b)|\w+(?:[-/&]\w+)*|[()\[\]{}]|[^\s\w.,:;!?'\"`\u2018\u2019\u201c\u201d\u2026\u2013\u2014-]"
)


def caption_scores(
    results: list[dict], gt_file: str | Path, java: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Score one caption per image against its references.

    Args:
        results: {"image_id": int or str, "caption": str} rows. Of rows with the same id the first counts; rows whose id
            the ground truth does not have are left out.
        gt_file: JSON in the COCO caption format: "annotations" with "image_id" and "caption".
        java: use Java where it is installed: for METEOR, SPICE and the tokenizer of published scores.

    Returns:
        scores: Bleu_1 .. Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE as fractions (CIDEr: up to 10), as far as they can be
            computed here.
        notes: name of a metric -> why it is left out, and remarks: under "PTBTokenizer" that a simple tokenizer was
            used, under "ground truth" and "results" the rows that are left out, under "CIDEr" that there is one image.

    UserError if the file is not of the format, a row has no id or text, or images of it have no result.
    """
    truth = read_ground_truth(gt_file)
    references, predictions, notes = _tokenized_sides(results, truth, java)
    scores, remarks = _score_all(references, predictions, java)
    return scores, notes | remarks


def domain_scores(
    results: list[dict], gt_file: str | Path, java: bool = True
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Score captions for each value of "domain" among the images (nocaps), and "overall", as `caption_scores`.

    Each domain is a corpus of its own, so the CIDEr of the whole is not the mean of the domains'. The notes on one
    domain only stand under "domain: name".
    """
    truth = read_ground_truth(gt_file)
    references, predictions, notes = _tokenized_sides(results, truth, java)
    places: dict[str, list[int]] = {}
    for place, key in enumerate(truth.references):
        if key in truth.domains:
            places.setdefault(truth.domains[key], []).append(place)
    if places and (lost := len(truth.references) - sum(map(len, places.values()))):
        notes["domains"] = f"{lost} of {len(truth.references)} images have none, and count overall only"
    scores, found = {}, {}
    for domain in sorted(places):
        sides = ({i: side[i] for i in places[domain]} for side in (references, predictions))
        scores[domain], remarks = _score_all(*sides, java=java)
        found |= {f"{domain}: {name}": reason for name, reason in remarks.items()}
    scores["overall"], remarks = _score_all(references, predictions, java)
    # a remark on the whole is not repeated for its domains
    found = {name: reason for name, reason in found.items() if name.rpartition(": ")[2] not in remarks}
    return scores, notes | found | remarks


def _tokenized_sides(results: list[dict], truth: GroundTruth, java: bool) -> tuple[Captions, Captions, dict[str, str]]:
    """Return references and predictions, tokenized, by position in the ground truth, and notes."""
    found, notes = predictions_for(results, truth)
    references = dict(enumerate(truth.references.values()))
    # both in one go, since starting Java takes longer than tokenizing
    flat = [caption for group in references.values() for caption in group] + [found[key] for key in truth.references]
    try:
        if reason := _no_java(java):
            raise FileNotFoundError(reason)
        flat = ptb_tokenize(flat)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        notes["PTBTokenizer"] = f"{error}; a simple tokenizer was used, so scores may differ from published ones"
        flat = [simple_tokenize(caption) for caption in flat]
    # METEOR separates its fields by bars.
    tokens = (caption.replace("|", " ").strip() for caption in flat)
    references = {i: [next(tokens) for _ in group] for i, group in references.items()}
    return references, {i: [next(tokens)] for i in references}, notes


# Tokens


def simple_tokenize(caption: str) -> str:
    """Return the caption in lower case, split nearly as the PTB tokenizer does, without punctuation."""
    tokens = TOKEN.findall(caption.lower().replace("\u2019", "'"))
    return " ".join(BRACKETS.get(token, token) for token in tokens)


def ptb_tokenize(captions: list[str]) -> list[str]:
    """Tokenize with pycocoevalcap's PTB tokenizer; OSError, SubprocessError or ValueError if Java fails."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    # The package's class writes into site-packages, which may be read-only, and loses empty captions; the period
    # keeps a line for them.
    lines = [" ".join(caption.split()) or "." for caption in captions]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="replace")
        command = [*JAVA, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(file)]
        done = subprocess.run(command, capture_output=True, check=True, timeout=TOKENIZER_SECONDS)
    tokenized = done.stdout.decode("utf-8").removesuffix("\n").split("\n")
    if len(tokenized) != len(captions):
        raise ValueError(f"the PTB tokenizer returned {len(tokenized)} lines for {len(captions)} captions")
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in drop) for line in tokenized]


# Metrics


def _no_java(wanted: bool) -> str:
    """Return why Java is not used, '' if it is."""
    if not wanted:
        return "needs Java, which java: false turned off"
    return "" if shutil.which("java") else "needs Java, and no `java` was found on the PATH"


def _score_all(references: Captions, predictions: Captions, java: bool) -> tuple[dict[str, float], dict[str, str]]:
    """Compute each metric separately, so that the failure of one loses no other."""
    obstacles = metric_obstacles(java)
    scores: dict[str, float] = {}
    notes = {"CIDEr": ONE_IMAGE} if len(references) == 1 else {}
    for name in SCORERS:
        reason = obstacles.get(name, "")
        if not reason:
            try:
                with contextlib.redirect_stdout(io.StringIO()), _open_scorer(name) as scorer:
                    found, _ = scorer.compute_score(references, predictions)
                several = {f"Bleu_{n}": value for n, value in enumerate(found, 1)} if name == "BLEU" else {name: found}
                scores |= {key: float(value) for key, value in several.items()}
            # any error inside one metric or its Java process must not lose the others
            except Exception as error:
                reason = f"failed: {type(error).__name__}: {error}".strip().splitlines()[0]
        if reason:
            notes[name] = reason
    return scores, notes


def metric_obstacles(java: bool) -> dict[str, str]:
    """Return the metrics that cannot be computed here, and why; UserError if none can."""
    if find_spec("pycocoevalcap") is None:
        raise UserError("caption metrics need the package pycocoevalcap, which is not installed; install it with pip")
    if reason := _no_java(java):
        return {"METEOR": reason, "SPICE": reason}
    from pycocoevalcap.spice import get_stanford_models as spice

    names = (f"{spice.JAR}.jar", f"{spice.JAR}-models.jar")
    if all((Path(spice.SPICEDIR) / spice.SPICELIB / name).is_file() for name in names):
        return {}  # without its models SPICE would download them when constructed
    remedy = "`python -m pycocoevalcap.spice.get_stanford_models` downloads them"
    return {"SPICE": f"needs the Stanford CoreNLP models, which are not installed; {remedy}"}


def _open_scorer(name: str) -> AbstractContextManager[Any]:
    """Return pycocoevalcap's scorer of a metric."""
    if name == "METEOR":
        return _meteor_process()
    package = SCORERS[name].lower()
    scorer = getattr(import_module(f"pycocoevalcap.{package}.{package}"), SCORERS[name])
    return nullcontext(scorer())


@contextlib.contextmanager
def _meteor_process() -> Iterator[Any]:
    """Start METEOR's Java process and end it in any case."""
    from pycocoevalcap.meteor import meteor as package

    meteor = package.Meteor.__new__(package.Meteor)  # its own start takes the decimal sign of the user's locale
    meteor.lock = threading.Lock()
    command = [*JAVA, "-jar", "-Xmx2G", package.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    meteor.meteor_p = subprocess.Popen(command, cwd=Path(package.__file__).parent, **pipes)
    try:
        yield meteor
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        # an error inside leaves the lock taken, and the destructor would wait for it forever
        if meteor.lock.locked():
            meteor.lock.release()
        with contextlib.suppress(BrokenPipeError):
            meteor.meteor_p.stdin.close()
        for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            pipe.close()
