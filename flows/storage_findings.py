"""What the preflight says about the place of the storage: what lies there already, and whether inputs contain it."""

from flows.config import RunConfig
from flows.run import Run
from operators.publish.own_folder import why_foreign
from operators.read.source_files import shown, would_read
from operators.stage import Finding

# Names below a storage that a run writes; of each, a file that a reader of folders and globs could take for data.
WRITTEN = (
    *("assets/raw_instructions/refresh=base/0.parquet", "ledger/reflect/0.parquet", "prompts/reflect/0.parquet"),
    *("scores/ifd/0/0.parquet", "students/0/config.json", "evaluations/0.parquet", "releases/000001.json"),
    *("refreshes/0.json", "published/parquet/0.parquet", "published/alpaca/0.jsonl", "published/messages/0.jsonl"),
    *("published/lineage.json", "reports/0.json", "released.json", "retracted.json"),
)


def place_findings(run: Run) -> list[Finding]:
    """Refuse a storage in which a run would delete what is not its own, or read as data what it wrote itself."""
    return [*_foreign(run), *_fed_to_itself(run.config)]


def _foreign(run: Run) -> list[Finding]:
    told = why_foreign(run.path("published"))
    return [Finding("storage", told)] if told else []


def _fed_to_itself(config: RunConfig) -> list[Finding]:
    inputs = {"source.path": [config.source.path], "pack.mixture.general": [config.pack.mixture.general]}
    inputs["decontaminate.files"] = list(config.decontaminate.files)
    return [
        Finding(
            key,
            f"{shown(path)} includes files that a run writes to storage={config.storage}, so each run would read what "
            "the one before wrote; give a storage outside it, or one whose name begins with a dot",
        )
        for key, paths in inputs.items()
        for path in paths
        if path and _would_read(path, config.storage)
    ]


def _would_read(path: str, storage: str) -> bool:
    try:
        return would_read(path, storage, WRITTEN)
    except (ValueError, OSError):  # it cannot be reached; another finding reports it
        return False
