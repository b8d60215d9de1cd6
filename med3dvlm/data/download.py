"""Fetch a data set repository, and say what to do where it cannot be had."""


def download(repo_id: str, folder) -> None:
    """Fetch a data set repository into `folder`. Raises SystemExit that says what to do where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        snapshot_download(repo_id, repo_type="dataset", local_dir=folder)
    except GatedRepoError as error:
        raise SystemExit(
            f"{repo_id} is gated: accept its terms on its page, run `hf auth login`, and start again"
        ) from error
    except RepositoryNotFoundError as error:
        raise SystemExit(
            f"{repo_id} is not there, or not visible to you. M3D-Cap has been withdrawn from its original host; the "
            f"README names other ways in. Data that you have already: put them under {folder} and leave --download out."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise SystemExit(
            f"{repo_id} could not be fetched ({type(error).__name__}: {error}). Check the connection (or HF_ENDPOINT), "
            "then start again: what has arrived is kept."
        ) from error
