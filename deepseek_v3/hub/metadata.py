"""The YAML at the top of a card, checked with huggingface_hub's own classes and as the Hub does, as far as known.

The Hub's endpoint `validate-yaml` is asked before every commit too (`huggingface_hub.create_commit` does that).
"""

import re
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

RELATIONS = ("adapter", "finetune", "merge", "quantized")
# https://huggingface.co/docs/hub/repositories-licenses, without `unknown`, which says nothing
LICENCES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl mpl-2.0 odc-by
    odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma other""".split()
)
_TEXT = ("license", "library_name", "pipeline_tag", "base_model_relation", "license_name", "license_link")
_TASK = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def read_card(text: str, where: str, base_model: str | None = None) -> ModelCard:
    """Parse a card, and check its front matter.

    Args:
        base_model: replaces the base that the card names, which may then be any path.

    Raises:
        ValueError: names `where` and the field, what was found and what is allowed.
    """

    def fail(field: str, found: object, allowed: str) -> ValueError:
        return ValueError(f"{where}: {field} is {found!r:.100}, allowed is {allowed}")

    block = REGEX_YAML_BLOCK.search(text)
    if not block:
        raise ValueError(f"{where}: does not begin with YAML between two lines of ---")
    try:
        raw = yaml.safe_load(block.group(2))
        card = ModelCard(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: the front matter is not YAML ({error})") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if base_model is not None:
        card.data["base_model"] = base_model

    for name in _TEXT:
        if name in raw and not isinstance(raw[name], str):
            raise fail(name, raw[name], "text")
    for name in ("tags", "datasets", "metrics"):
        if name in raw and not (isinstance(raw[name], list) and all(isinstance(item, str) for item in raw[name])):
            raise fail(name, raw[name], "a list of texts")
    if raw.get("license", "mit") not in LICENCES:
        raise fail("license", raw["license"], "one that https://huggingface.co/docs/hub/repositories-licenses lists")
    if raw.get("license") == "other" and not (raw.get("license_name") and raw.get("license_link")):
        raise fail("license", "other", "that with license_name and license_link beside it")
    if "pipeline_tag" in raw and not _TASK.fullmatch(raw["pipeline_tag"]):
        raise fail("pipeline_tag", raw["pipeline_tag"], "a task's name such as text-generation")
    for name in base_models(card):
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise fail("base_model", name, "the name of a repository on the Hub, namespace/name") from None
    relation = raw.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise fail("base_model_relation", relation, ", ".join(RELATIONS))
    if relation is not None and not base_models(card):
        raise fail("base_model", None, f"a repository on the Hub, for the card says base_model_relation: {relation}")
    _check_model_index(raw.get("model-index"), fail)
    return card


def base_models(card: ModelCard) -> list[str]:
    """The repositories that a card names as its base."""
    base = card.data.get("base_model")
    return [] if base is None else [base] if isinstance(base, str) else list(base)


def _check_model_index(index: Any, fail: Any) -> None:
    if index is None:
        return
    for model in index:  # its structure was parsed with the card
        for number, result in enumerate(model["results"]):
            where = f"model-index: result {number}"
            for part, names in (("task", ("type",)), ("dataset", ("type", "name"))):
                for name in names:
                    if not isinstance(result[part][name], str) or not result[part][name]:
                        raise fail(f"{where}: {part}.{name}", result[part][name], "text")
            if not result["metrics"]:
                raise fail(f"{where}: metrics", result["metrics"], "a list of at least one")
            for metric in result["metrics"]:
                value = metric["value"]
                if not isinstance(metric["type"], str) or isinstance(value, bool | None) or value != value:
                    raise fail(f"{where}: {metric['type']}", value, "a number or text")
