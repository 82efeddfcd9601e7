"""The configuration of the daemon, the section `schedule`."""

from pydantic import Field

from operators.stage import StageConfig


class ScheduleConfig(StageConfig):
    """When the daemon looks for new data."""

    cron: str = Field(
        "0 3 * * *",
        description="Five fields of cron, in UTC, at which the schedule looks for new data.",
    )
    sensor_seconds: int = Field(60, ge=1, description="Time between two looks of the sensor at the source, in seconds.")
    settle_seconds: float = Field(
        5,
        ge=0,
        description="Age in seconds below which a changed file may be half copied; it waits for the next look.",
    )
    active: bool = Field(
        False,
        description="Switch sensor and schedule on as soon as the daemon runs; else switch them on in the web page.",
    )
    existing_storage: bool = Field(
        False,
        description="The daemon works only in a storage that a run of the command line has made: without it, a file "
        "system that is not mounted would look like a new storage, and everything would be paid for again.",
    )
    max_attempts: int = Field(
        8, ge=1, description="Number of failed runs of a refresh after which it is given up until a person retries it."
    )
    retry_seconds: float = Field(
        60, ge=0, description="Wait in seconds after the first failed run of a refresh; each further one doubles it."
    )
    retry_max_seconds: float = Field(3600, ge=0, description="Longest wait between two attempts, in seconds.")
    alert_url_env: str = Field(
        "RECYCLE_ALERT_URL",
        description="Environment variable of the daemon with the URL of a webhook, which gets a message about each "
        "refresh that is given up.",
    )
    alert_command: tuple[str, ...] = Field(
        (), description="Program and arguments; it gets the same message as JSON on standard input."
    )
