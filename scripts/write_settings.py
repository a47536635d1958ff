"""Write the settings into .env.example and into the table of docs/configuration.md.

    python scripts/write_settings.py

Names, defaults and meanings are those of config.py, the groups of .env.example are those below. The words around them stand
in the two files and stay as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

from config import PROJECT_DIR, VARIABLES

ENV_EXAMPLE = PROJECT / ".env.example"
PAGE = PROJECT / "docs" / "configuration.md"

TABLE = re.compile(r"(?<=\|---\|---\|---\|\n)(\| `[A-Z_]+` \|.*\n)+")

GROUPS = {
    "Set these five first": "mode vae_model_name megapixels output_dir kafka_bootstrap_servers",
    "Folders, and the limits on requests": "model_dir output_ttl_days allowed_input_dirs allowed_output_dirs max_image_bytes "
    "allowed_input_urls allowed_output_urls allowed_private_networks storage_timeout_s storage_max_retries "
    "max_image_pixels max_output_megapixels image_timeout_s damaged_images",
    "Results": "latent_format preview roundtrip upscale_method fit alpha",
    "Kafka: topics and group": "kafka_request_topic kafka_response_topic kafka_dlq_topic kafka_consumer_group "
    "kafka_group_protocol kafka_group_instance_id kafka_transactional_id kafka_create_topics kafka_topic_partitions "
    "kafka_topic_replication",
    "Kafka: access": "kafka_security_protocol kafka_sasl_mechanism kafka_sasl_username kafka_sasl_password "
    "kafka_sasl_password_file kafka_ssl_ca_location kafka_ssl_certificate_location kafka_ssl_key_location "
    "kafka_ssl_key_password kafka_ssl_key_password_file kafka_client_config",
    "Kafka: retries, failures and times": "kafka_prefetch kafka_max_retries kafka_retry_backoff_s kafka_max_crashes "
    "kafka_breaker_failures kafka_max_message_bytes kafka_ack_timeout_s kafka_auth_timeout_s kafka_stall_timeout_s "
    "kafka_revoke_timeout_s shutdown_timeout_s encode_timeout_s",
    "Watching a worker": "http_port http_host log_level log_format warmup",
    "ComfyUI, device and speed": "comfyui_path custom_nodes device vae_precision encoder compile oom_policy torch_num_threads "
    "prepare_threads vae_cache_size",
}
"""The groups of .env.example: the heading of each, and its variables. Every variable is in one of them."""


def main() -> None:
    header, _, _ = ENV_EXAMPLE.read_text(encoding="utf-8").partition("\n\n")
    ENV_EXAMPLE.write_text("\n\n".join((header, *env_groups())) + "\n", encoding="utf-8")
    table = "".join(map(table_row, VARIABLES.items()))
    page, tables = TABLE.subn(lambda _: table, PAGE.read_text(encoding="utf-8"))
    assert tables == 1, f"{PAGE} has {tables} tables of settings"
    PAGE.write_text(page, encoding="utf-8")
    print(f"{len(VARIABLES)} variables written to {ENV_EXAMPLE.name} and {PAGE.relative_to(PROJECT)}")


def env_groups() -> Iterator[str]:
    """Yield the headings and entries of .env.example."""
    grouped = [name for names in GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(VARIABLES), f"not in one group: {set(grouped) ^ set(VARIABLES) or 'one is in two'}"
    for heading, names in GROUPS.items():
        yield f"# ---- {heading} ----"
        yield from (env_entry((name, VARIABLES[name])) for name in names.split())


def env_entry(setting: tuple[str, FieldInfo]) -> str:
    """Return a setting's comment and its assignment, which is commented out."""
    name, field = setting
    return f"# {field.description}\n#{name.upper()}={shown_default(field)}"


def table_row(setting: tuple[str, FieldInfo]) -> str:
    """Return a setting's row in the table: variable, default and meaning."""
    name, field = setting
    default = f" `{shown_default(field)}` " if shown_default(field) else " "
    return f"| `{name.upper()}` |{default}| {field.description} |\n"


def shown_default(field: FieldInfo) -> str:
    """Return the default as `.env` has it; empty if there is none. Paths in the project are relative to it."""
    default = field.default
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    return f"./{default.relative_to(PROJECT_DIR)}" if isinstance(default, Path) else str(default)


if __name__ == "__main__":
    main()
