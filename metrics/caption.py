"""Caption metrics (BLEU, METEOR, ROUGE-L, CIDEr, SPICE) on any ground truth in the COCO caption format."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils import UserError

Captions = dict[int, list[str]]  # captions of an image, under its place in the ground truth
NO_JAVA = "needs Java, and no `java` was found on the PATH"
TOKENIZER_SECONDS = 900

# Brackets keep the names that the PTB tokenizer gives them, as the published scores do.
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
TOKEN = re.compile(
    r"\d+(?:[.,:]\d+)+|(?:[a-z]\.){2,}|n't\b|'(?:s|m|d|re|ve|ll)\b"
    r"|\w+?(?=n't\b)|\w+(?:[-/&]\w+)*|[()\[\]{}]|[^\s\w.,:;!?'\"`\u2018\u2019\u201c\u201d\u2026\u2013\u2014-]"
)


def caption_scores(
    results: list[dict], gt_file: str | Path, java: bool = True
) -> tuple[dict[str, float], dict[str, str]]:
    """Score one caption an image against its references.

    Args:
        results: {"image_id": int or str, "caption": str} rows. Of rows with the same id the first counts;
            rows whose id the ground truth does not have are left aside.
        gt_file: JSON in the COCO caption format: "annotations" with "image_id" and "caption".
        java: use Java where there is one: for METEOR, SPICE and the tokenizer of published scores.

    Returns:
        scores: Bleu_1 .. Bleu_4, METEOR, ROUGE_L, CIDEr and SPICE as fractions (CIDEr: up to 10), as far as
            they can be computed here.
        left_out: name -> reason for what could not be computed. "PTBTokenizer" stands there when a simple
            tokenizer took its place, with which the scores may differ slightly from published ones.

    Raises:
        UserError: the file is not of the format, or images of it have no result.
    """
    references, predictions, _ = _pair(results, _read_ground_truth(gt_file), gt_file)
    references, predictions, left_out = _tokenize_both(references, predictions, java)
    scores, failed = _score_all(references, predictions, java)
    return scores, left_out | failed


def domain_scores(
    results: list[dict], gt_file: str | Path, java: bool = True
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Score captions for each value of "domain" among the images (NoCaps) and "overall".

    Args and errors are those of `caption_scores`. Each domain is a corpus of its own, so the CIDEr of the
    whole is not the mean of the domains'. Without domains only "overall" is there.

    Returns:
        scores: domain -> scores, and left_out: name -> reason ("domain: name" where only one domain failed).
    """
    truth = _read_ground_truth(gt_file)
    references, predictions, keys = _pair(results, truth, gt_file)
    references, predictions, left_out = _tokenize_both(references, predictions, java)
    images = truth.get("images")
    images = [row for row in images if isinstance(row, dict) and "id" in row] if isinstance(images, list) else []
    domain_of = {str(image["id"]): image.get("domain") for image in images}
    places: dict[str, list[int]] = {}
    for place, key in enumerate(keys):
        if domain_of.get(key) is not None:
            places.setdefault(str(domain_of[key]), []).append(place)
    scores = {}
    for domain in sorted(places):
        part = places[domain]
        scores[domain], failed = _score_all(
            *({i: side[i] for i in part} for side in (references, predictions)), java=java
        )
        left_out |= {f"{domain}: {name}": reason for name, reason in failed.items()}
    scores["overall"], failed = _score_all(references, predictions, java)
    # What fails everywhere is said once.
    left_out = {k: v for k, v in left_out.items() if k.rpartition(": ")[2] not in failed}
    return scores, left_out | failed


# Ground truth and results


def _read_ground_truth(gt_file: str | Path) -> dict[str, Any]:
    try:
        truth = json.loads(Path(gt_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read the ground truth {gt_file}: {error.strerror}; give a COCO caption file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{gt_file} is not JSON ({error}); expected a COCO caption file") from error
    rows = truth.get("annotations") if isinstance(truth, dict) else None
    rows = rows if isinstance(rows, list) else []
    if not rows or not all(isinstance(row, dict) and {"image_id", "caption"} <= row.keys() for row in rows):
        raise UserError(
            f"{gt_file} is not in the COCO caption format: expected an object whose list "
            '"annotations" holds rows with "image_id" and "caption"'
        )
    return truth


def _pair(results: list[dict], truth: dict, gt_file: str | Path) -> tuple[Captions, Captions, list[str]]:
    """Bring both sides under the same keys; ids are compared as text, so 7 and "7" are one image."""
    found: dict[str, str] = {}
    for row in results:
        if not {"image_id", "caption"} <= row.keys():
            raise UserError(f'a caption result has the keys {sorted(row)}; expected "image_id" and "caption"')
        found.setdefault(str(row["image_id"]), str(row["caption"]))
    wanted: dict[str, list[str]] = {}
    for row in truth["annotations"]:
        wanted.setdefault(str(row["image_id"]), []).append(str(row["caption"]))
    missing = [key for key in wanted if key not in found]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images of {gt_file} have no caption in the results "
            f"(image_id {first}); caption every image, or give the ground truth that belongs to them"
        )
    keys = list(wanted)
    return dict(enumerate(wanted.values())), {i: [found[key]] for i, key in enumerate(keys)}, keys


# Tokens


def simple_tokenize(caption: str) -> str:
    """Return the caption in lower case, split nearly as the PTB tokenizer does, without punctuation."""
    tokens = TOKEN.findall(caption.lower().replace("\u2019", "'"))
    return " ".join(BRACKETS.get(token, token) for token in tokens)


def ptb_tokenize(captions: list[str]) -> list[str]:
    """Tokenize with the PTB tokenizer that pycocoevalcap brings.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: Java is absent or fails, or its lines do not match.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    # Our own call of the jar and not the class: that one writes into site-packages, which may be read-only,
    # and loses captions that are empty. The mark keeps a line for those.
    lines = [" ".join(caption.split()) or "." for caption in captions]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "captions.txt"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
        command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8", str(file)]
        done = subprocess.run(command, capture_output=True, check=True, timeout=TOKENIZER_SECONDS)
    tokenized = done.stdout.decode("utf-8").removesuffix("\n").split("\n")
    if len(tokenized) != len(captions):
        raise ValueError(f"the PTB tokenizer returned {len(tokenized)} lines for {len(captions)} captions")
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in drop) for line in tokenized]


def _tokenize_both(
    references: Captions, predictions: Captions, java: bool
) -> tuple[Captions, Captions, dict[str, str]]:
    """Tokenize references and predictions in one go, since starting Java takes longer than tokenizing."""
    flat = [caption for side in (references, predictions) for group in side.values() for caption in group]
    left_out = {}
    try:
        if reason := _no_java(java):
            raise FileNotFoundError(reason)
        flat = ptb_tokenize(flat)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        left_out["PTBTokenizer"] = (
            f"{error}; a simple tokenizer took its place, so scores may differ slightly"
        )
        flat = [simple_tokenize(caption) for caption in flat]
    # METEOR separates its fields by bars.
    tokens = (caption.replace("|", " ").strip() for caption in flat)
    sides = (
        {i: [next(tokens) for _ in group] for i, group in side.items()} for side in (references, predictions)
    )
    return next(sides), next(sides), left_out


# Metrics


def _no_java(wanted: bool) -> str:
    """Say why Java is not used; empty when it is."""
    if not wanted:
        return "needs Java, which java: false turned off"
    return "" if shutil.which("java") else NO_JAVA


def _score_all(
    references: Captions, predictions: Captions, java: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Run each metric by itself, so that the failure of one loses no other."""
    if find_spec("pycocoevalcap") is None:
        raise UserError(
            "caption metrics need the package pycocoevalcap, which is not installed; install it with pip"
        )
    scores: dict[str, float] = {}
    left_out: dict[str, str] = {}
    metrics: dict[str, Callable] = {
        "BLEU": _bleu, "METEOR": _meteor, "ROUGE_L": _rouge, "CIDEr": _cider, "SPICE": _spice
    }  # fmt: skip
    for name, metric in metrics.items():
        reason = _obstacle(name, java)
        if not reason:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    scores |= metric(references, predictions)
            # Whatever goes wrong inside one metric, a Java process included, must not lose the others.
            except Exception as error:
                reason = f"failed: {type(error).__name__}: {error}".strip().splitlines()[0]
        if reason:
            left_out[name] = reason
    return scores, left_out


def _obstacle(name: str, java: bool) -> str:
    """Say why a metric cannot be tried here; empty when it can."""
    if name in ("METEOR", "SPICE") and (reason := _no_java(java)):
        return reason
    if name == "SPICE" and _spice_models_missing():
        return (
            "needs the Stanford CoreNLP models, which are not installed; "
            "`python -m pycocoevalcap.spice.get_stanford_models` downloads them"
        )
    return ""


def _spice_models_missing() -> bool:
    """Look for what SPICE would otherwise download as soon as it is constructed."""
    from pycocoevalcap.spice import get_stanford_models as spice

    names = (f"{spice.JAR}.jar", f"{spice.JAR}-models.jar")
    return not all((Path(spice.SPICEDIR) / spice.SPICELIB / name).is_file() for name in names)


def _bleu(references: Captions, predictions: Captions) -> dict[str, float]:
    from pycocoevalcap.bleu.bleu import Bleu

    values, _ = Bleu(4).compute_score(references, predictions)
    return {f"Bleu_{n}": float(value) for n, value in enumerate(values, start=1)}


def _rouge(references: Captions, predictions: Captions) -> dict[str, float]:
    from pycocoevalcap.rouge.rouge import Rouge

    return {"ROUGE_L": float(Rouge().compute_score(references, predictions)[0])}


def _cider(references: Captions, predictions: Captions) -> dict[str, float]:
    from pycocoevalcap.cider.cider import Cider

    return {"CIDEr": float(Cider().compute_score(references, predictions)[0])}


def _meteor(references: Captions, predictions: Captions) -> dict[str, float]:
    with _meteor_process() as meteor:
        return {"METEOR": float(meteor.compute_score(references, predictions)[0])}


@contextlib.contextmanager
def _meteor_process() -> Iterator[Any]:
    """Start METEOR's Java process and end it in any case."""
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    try:
        yield meteor
    finally:
        meteor.meteor_p.kill()
        meteor.meteor_p.wait()
        # An error inside leaves the lock taken, and its destructor would then wait for it for ever.
        if meteor.lock.locked():
            meteor.lock.release()
        with contextlib.suppress(BrokenPipeError):
            meteor.meteor_p.stdin.close()
        for pipe in (meteor.meteor_p.stdout, meteor.meteor_p.stderr):
            pipe.close()


def _spice(references: Captions, predictions: Captions) -> dict[str, float]:
    from pycocoevalcap.spice.spice import Spice

    return {"SPICE": float(Spice().compute_score(references, predictions)[0])}
