"""`megascale export`: a checkpoint becomes a model folder that `transformers` loads."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megascale.commands.import_model import add_check_arguments, check_tokens
from megascale.config import RunConfig, SourceConfig
from megascale.config.load import whole_number
from megascale.errors import UserError

if TYPE_CHECKING:
    from megascale.checkpoint.load import Found
    from megascale.convert.huggingface.kept import Kept

SHARD_BYTES = "4Gi"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `megascale export`."""
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="checkpoint folder, or a run_dir for its latest")
    add("out", metavar="OUT", help="model folder to make")
    add(
        "--tokenizer",
        metavar="FOLDER",
        help="prepared corpus or Hugging Face folder; default: what the checkpoint was imported "
        "with, else that of the run's first corpus that has one, else that of the model it "
        "comes from",
    )
    add(
        "--shard-bytes",
        default=SHARD_BYTES,
        metavar="N",
        help=f"largest file, such as 500M or 2Gi; default: {SHARD_BYTES}",
    )
    add_check_arguments(parser)


def run_export(args: argparse.Namespace) -> int:
    """Convert, compare and say so; returns the exit status. Raises UserError for bad input."""
    from megascale.runtime import distributed

    distributed.prepare_device("auto")
    from megascale.checkpoint.folder import whole_or_not_at_all
    from megascale.checkpoint.load import find_at

    shard_bytes = whole_number(args.shard_bytes, "--shard-bytes", least=1)
    found, out = find_at(args.checkpoint), Path(args.out)
    with whole_or_not_at_all(out) as unfinished:
        said = _convert(found, unfinished, shard_bytes, args)
    print("\n".join([f"{out}: {said[0]}", *said[1:]]))
    return 0


def _convert(found: Found, out: Path, shard_bytes: int, args: argparse.Namespace) -> list[str]:
    """Write the model folder; what there is to say."""
    from megascale.checkpoint.tensors import Tensors
    from megascale.convert.compare_logits import compare_logits, require_close
    from megascale.convert.huggingface.files import write_files
    from megascale.convert.huggingface.weights import export_shapes, export_tensors
    from megascale.convert.one_rank import run_config

    config, stored = run_config(found), Tensors(found)
    shapes = export_shapes(config.model)
    dtype = stored.read("decoder.final_layernorm.weight").dtype
    type_name = str(dtype).removeprefix("torch.")
    source = tokenizer_folder(found, config, args.tokenizer)
    family, notes = write_settings(found, config, type_name, source, out)
    tensors = export_tensors(stored, config.model)
    files = write_files(out, shapes, dtype, tensors, shard_bytes)
    said = [f"{family} in {type_name}, {len(files)} file{'s' * (len(files) > 1)}"]
    if args.check:
        difference = compare_logits(out, found, dtype, check_tokens(args))
        require_close(difference, args.tolerance)
        said.append(f"  logits      {difference}")
    said.append(f"  tokenizer   {f'of {source}' if source else 'none; --tokenizer adds one'}")
    return said + [f"  note        {note}" for note in notes]


def write_settings(
    found: Found, config: RunConfig, dtype: str, source: Path | None, out: Path
) -> tuple[str, list[str]]:
    """Write all files of a model folder but the weights; its family, and what there is to say.

    `source` is where the tokenizer comes from. Raises UserError where no family has such a model,
    and where the tokenizer has ids that it lacks.
    """
    from megascale.convert.huggingface.config import config_of
    from megascale.convert.huggingface.kept import Kept
    from megascale.convert.huggingface.merge import merged_config
    from megascale.convert.huggingface.tokenizer import raise_max_length, write_tokenizer
    from megascale.run.start import home_of

    kept, context_tokens = Kept.of(home_of(found.folder.resolve())), config.data.context_tokens
    if kept is not None:
        document = merged_config(kept, config.model, context_tokens, dtype)
        return document["model_type"], write_kept(kept, document, source, out)
    theirs = config_of(config.model, context_tokens, dtype)
    if source is not None:
        write_tokenizer(source, out, context_tokens)
        raise_max_length(out, context_tokens)
    write_configs(theirs, out, source)
    return theirs.model_type, []


def tokenizer_folder(found: Found, config: RunConfig, given: str | None) -> Path | None:
    """The corpus or Hugging Face folder whose tokenizer a checkpoint's model was trained with.

    Raises UserError for a corpus of the run that is not what the run has read.
    """
    from megascale.convert.huggingface.kept import KEPT
    from megascale.convert.huggingface.tokenizer import has_tokenizer
    from megascale.corpus.sources import CORPUS_FILE, TOKENIZER_FOLDER
    from megascale.run.start import home_of

    if given is not None:
        return Path(given)
    if (found.folder / TOKENIZER_FOLDER).is_dir():
        return found.folder / TOKENIZER_FOLDER
    for name, source in config.data.sources.items():
        if (Path(source.path) / CORPUS_FILE).is_file():
            held = found.manifest.position.cursor.get("sources", {}).get(name)
            if held is not None:
                _require_same(name, source, held)
            return Path(source.path)
    kept = home_of(found.folder.resolve()) / KEPT
    return kept if has_tokenizer(kept) else None


def _require_same(name: str, source: SourceConfig, held: str) -> None:
    from megascale.corpus.sources import describe, identity
    from megascale.run.replay import part_seen

    try:
        now = identity(part_seen(describe(source.path), source))
    except UserError as error:
        now = str(error)
    if now != held:
        raise UserError(
            f"source '{name}' held {held} when the checkpoint was written, now: {now}; if its "
            f"tokenizer is still the same, give --tokenizer {source.path}"
        )


def require_known(num_ids: int, model_ids: int, folder: Path) -> None:
    """Raises UserError where the tokenizer of a folder has ids that the model lacks."""
    if num_ids > model_ids:
        raise UserError(
            f"tokenizer of {folder}: it has {num_ids:,} ids, the model knows {model_ids:,}; give "
            "the one that the model was trained with, --tokenizer FOLDER"
        )


def load_theirs(folder: Path, runs_code: bool = False) -> Any:
    """The tokenizer of a Hugging Face folder. `runs_code`: Python files there may be executed.

    Raises UserError where it cannot be loaded, also for want of that code.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=runs_code
        )
    except Exception as error:  # it raises many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"tokenizer of {folder}: transformers cannot load it: {reason}") from None


def write_configs(theirs: Any, out: Path, source: Path | None) -> None:
    """Write config.json and generation_config.json, with the ids that begin and end a text.

    `source` is where the tokenizer in `out` comes from. Raises UserError where it has ids that
    the model lacks.
    """
    from transformers import GenerationConfig

    from megascale.convert.huggingface.config import write_config

    if source is not None:
        ids = _ids_of(out, theirs.vocab_size, source)
        theirs.bos_token_id, theirs.eos_token_id = ids["bos_token_id"], ids["eos_token_id"]
    write_config(theirs, out)
    GenerationConfig.from_model_config(theirs).save_pretrained(out)


def write_kept(kept: Kept, document: dict[str, Any], source: Path | None, out: Path) -> list[str]:
    """Write config.json (`document`), what an import has kept beside it, and the tokenizer of
    `source`; what there is to say.

    Ids that begin and end a text are those of the import, unless `source` has another tokenizer.
    Raises UserError where it has ids that the model lacks.
    """
    from megascale.convert.huggingface.documents import CONFIG, GENERATION, write_document
    from megascale.convert.huggingface.kept import POSITIONS, without_unknown_ids
    from megascale.convert.huggingface.tokenizer import (
        has_same_settings,
        raise_max_length,
        relation,
        write_related,
    )

    vocab_size, generation, notes = document["vocab_size"], kept.generation, []
    if source is not None:
        related, positions = relation(source, kept.folder), document[POSITIONS]
        write_related(source, kept.folder, related, out, positions)
        if positions > kept.config[POSITIONS] or not has_same_settings(out, kept.folder):
            raise_max_length(out, positions)
        if related == "other":
            ids = _ids_of(out, vocab_size, source)
            document |= ids
            generation = None if generation is None else {**generation, **ids}
            notes.append(
                f"the tokenizer of {source} is another than the imported one, so ids that begin "
                "and end a text are its own, and the imported chat template is left out"
            )
        elif related == "larger":
            _ids_of(out, vocab_size, source)
    document, lost = without_unknown_ids(document, vocab_size)
    write_document(document, out / CONFIG)
    if generation is not None:
        generation, more = without_unknown_ids(generation, vocab_size)
        lost += [f"{option} of {GENERATION}" for option in more]
        write_document(generation, out / GENERATION)
    known = f"the model knows {vocab_size:,} ids, so what is above them was left out of"
    notes += [f"{known} {option}" for option in lost]
    return [*notes, *_notes_on_end(source, {**document, **(generation or {})})]


def _notes_on_end(source: Path | None, settings: Mapping[str, Any]) -> Iterator[str]:
    """What there is to say where generation does not stop at what ended documents in training."""
    from megascale.corpus.sources import CORPUS_FILE
    from megascale.corpus.tokenizers import load_tokenizer

    if source is None or not (source / CORPUS_FILE).is_file():
        return
    ends, eod_id = settings.get("eos_token_id"), load_tokenizer(source).eod_id
    if eod_id not in (ends if isinstance(ends, list) else [ends]):
        yield (
            f"documents ended with id {eod_id} in training, and eos_token_id = {ends} of the "
            "import does not have it; add it where generation is to stop there"
        )


def _ids_of(out: Path, model_ids: int, source: Path) -> dict[str, Any]:
    """The ids that begin, end and pad a text by the tokenizer in `out`, which is that of `source`.

    Raises UserError where it cannot be loaded or has ids that the model lacks.
    """
    from megascale.convert.huggingface.tokenizer import INFOWINDOW_CLASS

    # the only code there is our own, which was just written
    tokenizer = load_theirs(out, runs_code=(out / INFOWINDOW_CLASS.name).is_file())
    require_known(max(tokenizer.get_vocab().values()) + 1, model_ids, source)
    return {name: getattr(tokenizer, name) for name in SPECIAL_IDS}
