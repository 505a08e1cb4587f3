"""Reading a job file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from rlhf_core.errors import ConfigError
from rlhf_core.jobs import Job, parse_job


def read_job(path: Path) -> Job:
    """Read one job file.

    Raises:
        ConfigError: the file is missing, not JSON, or not a job.
    """
    try:
        return parse_job(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"Cannot read the job file {path}: {error.strerror}.") from error
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part)[:60] for part in item['loc']) or 'the job'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError(f"{path} is not a job file: {'; '.join(problems)[:2000]}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a job file: {error}") from error
