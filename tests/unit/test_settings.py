"""hotswap.toml: every key known, every error naming key and value."""

import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from schemas.state import ModelSpec
from services import settings
from services.settings import (
    ApiSettings,
    GpuSettings,
    ModelSettings,
    NatsSettings,
    SchedulerSettings,
    Settings,
    SettingsError,
    TelemetrySettings,
    parse_bytes,
)

EXAMPLE = Path(__file__).parents[2] / "deploy" / "config.example.toml"


def parse(text: str) -> Settings:
    return settings.parse(tomllib.loads(text), origin="hotswap.toml", folder=Path("/srv"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[api]\nprot = 1", "unknown key api.prot = 1; did you mean 'port'?"),
        ("[apis]\nport = 1", "unknown key apis = {'port': 1}; did you mean 'api'?"),
        ('[api]\nport = "x"', "api.port = 'x': Expected `int`, got `str`"),
        ("[api]\nport = 99999", "port = 99999 is not a port number"),
        ("api = 3", "api = 3: Expected `object`"),
        ('[nats]\nurl = "10.0.0.5"', "url = '10.0.0.5' must look like nats://host:4222"),
        ('[api]\nauth = "maybe"', "api.auth = 'maybe'"),
        ('[api]\ntls_cert = "c.pem"', "tls_cert = 'c.pem' and tls_key = '': give both, or neit"),
        ("[api]\nmax_open_requests = 0", "max_open_requests = 0 must be greater than 0"),
        ("[api]\nwrite_timeout_s = -1.0", "write_timeout_s = -1.0 must be greater than 0"),
        ('[nats]\nhost = "0.0.0.0"', "host = '0.0.0.0' is not loopback: the embedded NATS server"),
        ('[nats]\ntls_key = "k.pem"', "tls_cert = '' and tls_key = 'k.pem': give both, or neither"),
        (
            '[nats]\nurl = "tls://n:4222"\ntls_cert = "c"\ntls_key = "k"',
            "tls_cert is of the embedded server, and url names another one",
        ),
        ("[scheduler]\nrun_quantum_s = 0.0", "run_quantum_s = 0.0 must be greater than 0"),
        ('[[gpus]]\nname = "a b"', "name = 'a b' may hold letters"),
        ('[[gpus]]\nname = "a"\nmemory = "12 parsecs"', "'12 parsecs' is not a size"),
        ('[[gpus]]\nname = "a"\nhost_memory = "most"', "'most' is not a size"),
        ('[[gpus]]\nname = "a"\nlink_gb_per_s = -1.0', "link_gb_per_s = -1.0 must not be neg"),
        ('[[gpus]]\nname = "a"\nverify = "some"', "verify = 'some'"),
        ('[[gpus]]\nname = "a"\nmemori = "1GiB"', "did you mean 'memory'?"),
        ('[[gpus]]\nname = "a"\n[[gpus]]\nname = "a"', "name = 'a' is used twice"),
        ('[models.a]\nsource = "./x"\nmax_batch = -1', "models.a: max_batch = -1 must be greater"),
        ('[models.a]\nsrc = "./x"', "unknown key models.a.src = './x'; did you mean 'source'?"),
        ('[models.a]\nsource = "./x"\ndtype = "int3"', "models.a.dtype = 'int3'"),
        ("[models.a]\nmax_batch = 1", "missing required field `source`"),
        ('[models.a]\nsource = "./x"\npriority = 101', "a: priority = 101 must be from -100 to"),
        ('[models.a]\nsource = "./x"\npriority = -101', "priority = -101 must be from -100 to 100"),
        ('[models.a]\nsource = "./x"\nttft_target_s = 0.0', "a: ttft_target_s = 0.0 must be gr"),
        ('[models.a]\nsource = "./x"\ntoken_target_s = -1', "a: token_target_s = -1.0 must be gr"),
        ('[models.a]\nsource = "./x"\nttft_target_s = nan', "ttft_target_s = nan must be a fin"),
        ('[models.a]\nsource = "./x"\nttl_s = -0.5', "models.a: ttl_s = -0.5 must not be neg"),
        ('[models.a]\nsource = "./x"\nttl_s = inf', "models.a: ttl_s = inf must be a finite"),
        ('[models.a]\nsource = "./x"\npinned = 1', "models.a.pinned = 1: Expected `bool`"),
        ('[models.a]\nsource = "./x"\ngpus = "g"', "models.a.gpus = 'g': Expected `array`"),
        ('[models.a]\nsource = "./x"\ngpus = ["g", "g"]', "gpus = ['g', 'g']: 'g' is named twice"),
        ("[scheduler]\nttft_target_s = 0.0", "ttft_target_s = 0.0 must be greater than 0"),
        ("[scheduler]\ntoken_target_s = nan", "token_target_s = nan must be greater than 0"),
        ("[scheduler]\nstarvation_s = -1.0", "starvation_s = -1.0 must be greater than 0"),
        ('[scheduler]\npreemption = "on"', "scheduler.preemption = 'on': Invalid enum"),
        ("[scheduler]\nreplicate = 1", "scheduler.replicate = 1: Expected `bool`"),
        ("models = 3", "write each model as [models.NAME]"),
        ('[telemetry]\nlog_level = "loud"', "telemetry.log_level = 'loud'"),
    ],
)
def test_a_bad_value_is_named(text: str, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert str(caught.value).startswith("hotswap.toml: ")


def model(name: str, *lines: str) -> str:
    return "\n".join((f"[models.{name}]", 'source = "/x"', *lines, ""))


TWO_GPUS = '[[gpus]]\nname = "g0"\n[[gpus]]\nname = "g1"\n'
PINNED = ("pinned = true", 'exclusive_group = "big"')


def test_a_model_may_use_only_gpus_that_there_are() -> None:
    wrong = model("a", 'gpus = ["g1", "g7"]')
    with pytest.raises(SettingsError) as caught:
        parse(TWO_GPUS + wrong)
    assert str(caught.value) == (
        "hotswap.toml: models.a: gpus = ['g1', 'g7']: no [[gpus]] has the name 'g7'; "
        "known names: g0, g1"
    )
    assert parse(TWO_GPUS + model("a", 'gpus = ["g1"]')).models["a"].gpus == ("g1",)
    # What the machine has is not known yet.
    assert parse(wrong).models["a"].gpus == ("g1", "g7")


@pytest.mark.parametrize(
    ("text", "names", "gpus"),
    [
        (TWO_GPUS + "".join(model(n, *PINNED) for n in "abc"), "abc", "g0, g1"),
        (TWO_GPUS + "".join(model(n, *PINNED, 'gpus = ["g1"]') for n in "ab"), "ab", "g1"),
        ("".join(model(n, *PINNED, 'gpus = ["g5"]') for n in "ab"), "ab", "g5"),
    ],
    ids=["more than GPUs", "on one of two GPUs", "on one GPU of an unknown machine"],
)
def test_pinned_models_of_a_group_need_a_gpu_each(text: str, names: str, gpus: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert str(caught.value) == (
        f"hotswap.toml: models: {', '.join(names)} have pinned = true and exclusive_group = 'big', "
        f"so each needs a GPU of its own, but they may use only: {gpus}"
    )


@pytest.mark.parametrize(
    "text",
    [
        TWO_GPUS + model("a", *PINNED) + model("b", *PINNED),
        TWO_GPUS + model("a", *PINNED, 'gpus = ["g0"]') + model("b", *PINNED),
        TWO_GPUS + "".join(model(name, "pinned = true") for name in "abc"),
        TWO_GPUS + "".join(model(name, 'exclusive_group = "big"') for name in "abc"),
        "".join(model(name, *PINNED) for name in "abc"),
    ],
    ids=["a GPU each", "one is bound", "no group", "not pinned", "the machine is asked later"],
)
def test_groups_that_fit_are_taken(text: str) -> None:
    parse(text)


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: No such file"):
        settings.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[api\n")
    with pytest.raises(SettingsError, match=r"bad\.toml is not valid TOML"):
        settings.load(tmp_path / "bad.toml")


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "hotswap.toml").write_text(
        '[models.a]\nsource = "models/a"\n[models.b]\nsource = "./b"\n'
        '[models.c]\nsource = "Qwen/Qwen2.5-7B"\n'
    )
    found = settings.load(tmp_path / "hotswap.toml")
    assert found.models["a"].source == str(tmp_path / "models" / "a")
    assert found.models["b"].source == str(tmp_path / "b")
    assert found.models["c"].source == "Qwen/Qwen2.5-7B"
    assert found.state_path == tmp_path / ".hotswap"


@pytest.mark.parametrize(
    ("host", "auth", "required"),
    [
        ("127.0.0.1", "auto", False),
        ("127.8.8.8", "auto", False),
        ("::1", "auto", False),
        ("localhost", "auto", False),
        ("0.0.0.0", "auto", True),
        ("::", "auto", True),
        ("10.0.0.5", "auto", True),
        ("localhost.example.com", "auto", True),
        ("127.0.0.1", "on", True),
        ("0.0.0.0", "off", False),
    ],
)
def test_keys_are_asked_for_unless_only_this_machine_can_come(
    host: str, auth: Any, required: bool
) -> None:
    assert ApiSettings(host=host, auth=auth).requires_keys is required


def test_tls_files_are_relative_to_the_file_too() -> None:
    found = parse(
        '[api]\ntls_cert = "c.pem"\ntls_key = "/k.pem"\n[nats]\nurl = "tls://n:1"\ntls_ca = "a"'
    )
    assert (found.api.tls_cert, found.api.tls_key) == ("/srv/c.pem", "/k.pem")
    assert (found.nats.tls_ca, found.nats.tls_cert) == ("/srv/a", "")


def test_dump_is_read_back() -> None:
    before = parse(
        '[scheduler]\npreemption = "off"\nstarvation_s = inf\n[[gpus]]\nname = "g"\n'
        + model("a", "max_batch = 3", 'gpus = ["g"]', "ttft_target_s = 0.5", "ttl_s = 60")
        + model("b")
    )
    again = settings.parse(
        tomllib.loads(settings.dump(before)), origin="dump", folder=Path("/elsewhere")
    )
    assert again == before


def test_model_specs_carry_every_setting() -> None:
    (spec,) = parse('[models.a]\nsource = "/x"\nmax_batch = 3\nkv_tokens = 64').model_specs()
    assert (spec.name, spec.source, spec.max_batch, spec.kv_tokens) == ("a", "/x", 3, 64)
    (spec,) = parse(
        model("a", "pinned = true", 'gpus = ["g1", "g0"]', "priority = -100", "ttl_s = 60")
        + 'ttft_target_s = 0.5\ntoken_target_s = 0.05\nexclusive_group = "big"'
    ).model_specs()
    assert spec == ModelSpec(
        name="a",
        source="/x",
        pinned=True,
        gpus=("g1", "g0"),
        priority=-100,
        ttft_target_s=0.5,
        token_target_s=0.05,
        exclusive_group="big",
        ttl_s=60.0,
    )


def test_a_model_and_its_spec_have_the_same_settings_and_defaults() -> None:
    def defaults(kind: type[msgspec.Struct]) -> dict[str, object]:
        return {field.name: field.default for field in msgspec.structs.fields(kind)}

    assert defaults(ModelSpec) == {"name": msgspec.NODEFAULT, **defaults(ModelSettings)}


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1.5GiB", 3 * 2**29), ("800 MB", 800_000_000), ("12", 12), (7, 7), ("1kib", 1024)],
)
def test_parse_bytes(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def test_the_example_shows_every_key_with_its_default() -> None:
    text = EXAMPLE.read_text()
    raw = tomllib.loads(text)
    shown = settings.parse(raw, origin="example", folder=Path("/srv"))
    assert shown.api == ApiSettings()
    assert shown.nats == NatsSettings()
    assert shown.scheduler == SchedulerSettings()
    assert shown.telemetry == TelemetrySettings()
    assert shown.gpus == (GpuSettings(name="gpu0"),)
    assert shown.models["llama"] == ModelSettings(source=shown.models["llama"].source)
    for section, kind in (
        (raw["api"], ApiSettings),
        (raw["nats"], NatsSettings),
        (raw["scheduler"], SchedulerSettings),
        (raw["telemetry"], TelemetrySettings),
        (raw["gpus"][0], GpuSettings),
    ):
        assert set(section) == set(kind.__struct_fields__)
    of_model = text.partition("[models.llama]")[2]  # some keys are in [scheduler], too
    for key in ModelSettings.__struct_fields__:
        assert f"\n{key} = " in of_model or f"\n# {key} = " in of_model


def test_defaults_and_overrides_are_read_and_written_back(tmp_path: Path) -> None:
    file = tmp_path / "hotswap.toml"
    file.write_text(
        '[models.a]\nsource = "/a"\naliases = ["x"]\nmin_residency_s = 2\n'
        'defaults = { temperature = 0.5 }\noverrides = { seed = "unset", stop = ["a"] }\n'
    )
    config = settings.load(file)
    assert config.models["a"].overrides == {"seed": None, "stop": ["a"]}
    [spec] = config.model_specs()
    assert (spec.aliases, spec.defaults, spec.min_residency_s) == (("x",), {"temperature": 0.5}, 2)
    file.write_text(settings.dump(config))
    assert settings.load(file) == config


def test_an_alias_that_is_taken_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "hotswap.toml"
    file.write_text('[models.a]\nsource = "/a"\naliases = ["b"]\n[models.b]\nsource = "/b"\n')
    with pytest.raises(SettingsError, match="'b' is a name of model 'b' already"):
        settings.load(file)
