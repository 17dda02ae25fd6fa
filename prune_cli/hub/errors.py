"""What the hub or the network refused, as one sentence that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prune_cli.errors import PruneError, RequestError, one_line


@contextmanager
def hub_failures(repo: str, *, create_pr: bool) -> Iterator[None]:
    """Turn what huggingface_hub raises inside into RequestError (refused) or PruneError (the way there failed)."""
    try:
        yield
    except PruneError:
        raise
    except Exception as error:  # the client's transport has exceptions of its own
        raise _told(error, repo, create_pr=create_pr) from error


def _told(error: Exception, repo: str, *, create_pr: bool) -> PruneError:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    chain = list(_causes(error))
    answer = next((each for each in chain if isinstance(each, HfHubHTTPError)), None)
    hub = constants.ENDPOINT
    status = None if answer is None or answer.response is None else answer.response.status_code
    if any(isinstance(each, ValueError) and "README.md" in str(each) for each in chain):
        return RequestError(f"The hub refuses the metadata of README.md ({one_line(error)}): correct its first lines.")
    if answer is None or status is None or status >= 500 or status == 429 or _is_storage(answer):
        return PruneError(
            f"Sending to {hub} was cut short ({one_line(chain[-1])}): run the same command again; files that arrived "
            "are not sent again, and the repository is unchanged until all have."
        )
    if isinstance(answer, RevisionNotFoundError):
        return RequestError(f"{repo} has no such revision, and it could not be made: check --revision.")
    if isinstance(answer, RepositoryNotFoundError) or status == 404:
        return RequestError(
            f"{hub} has no model {repo} that this token can see: check the name"
            + (", or leave --create-pr out to make it." if create_pr else " and the token.")
        )
    if status == 401:
        return RequestError(
            f"{hub} refuses the token: make one that may write at {hub}/settings/tokens, then run `hf auth login` "
            "or set HF_TOKEN."
        )
    if status == 403:
        instead = "" if create_pr else ", push to a repository of your own, or propose it with --create-pr"
        return RequestError(f"This token may not write to {repo}: use one that may ({hub}/settings/tokens){instead}.")
    return RequestError(f"{hub} refuses the upload to {repo} ({one_line(answer)}).")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_storage(answer: object) -> bool:
    """An upload goes to a storage by signed links; its refusals say nothing about the token."""
    request = getattr(getattr(answer, "response", None), "request", None)
    return getattr(request, "method", "") == "PUT"
