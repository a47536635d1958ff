"""URLs: parsed, normalised, compared with prefixes, and shown without their secrets."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from config import Settings, SettingsError, load_settings
from errors import AccessDenied, InvalidRequest
from latent_encoder.access import AllowedFolders, place_of
from latent_encoder.masking import masked
from latent_encoder.outputs.names import output_files
from latent_encoder.requests import parse_request
from latent_encoder.storage.access import AllowedUrls, is_public
from latent_encoder.storage.locations import ObjectPath, WebUrl, is_url, lasting, location_of, path_of_file_url, shown, stem_of

INPUTS = AllowedUrls("image_path", ("https://images.example.org/public", "s3://bucket/in", "http://[::1]:8080/"))


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.org/public/a.png",
        "HTTPS://IMAGES.Example.ORG:443/public/a.png",
        "https://images.example.org./public/a.png",
        "https://images.example.org/public/x/../a.png",
        "https://images.example.org/./public/%61.png",
        "https://images.example.org/%70ublic/a.png?X-Amz-Signature=abc",
        "https://images.example.org/public/%E4%BD%A0.png",
        "https://images.example.org/other/../public/a.png",
        "s3://bucket/in/a.png",
        "S3://bucket/in/sub/a b%20c?.png",
        "http://[0:0:0:0:0:0:0:1]:8080/a.png",
        "https://images.example.org:/public/a.png",
        "https://images.example.org:00443/public/a.png",
        "https://IMAGES.example.org/public/a#/../../secret.png",
        "https://images\u3002example.org/public/a.png",
        "https://images.example.org/public/a;v=1.png",
        "https://images.example.org/public/100%.png",
        "s3://bucket/in/a\\b?c#d.png",
        "s3://bucket/in/e\u0301.png",
        "s3://bucket/in/x%2fy.png",
    ],
)
def test_urls_below_a_prefix(url: str) -> None:
    """A URL that is below a prefix in its normalised form is allowed."""
    INPUTS.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.org/publicity/a.png",
        "https://images.example.org/public/../secret/a.png",
        "https://images.example.org/public/x/%2e%2e/%2E%2E/secret.png",
        "https://images.example.org/Public/a.png",
        "https://images.example.org:8443/public/a.png",
        "http://images.example.org/public/a.png",
        "https://images.example.org.evil.net/public/a.png",
        "https://evil.net/https://images.example.org/public/a.png",
        "https://evil.net#images.example.org/public/a.png",
        "https://evil.net?images.example.org/public/a.png",
        "https://images.example.org//public/a.png",
        "s3://bucket/in2/a.png",
        "s3://bucket/a.png",
        "s3://Bucket/in/a.png",
        "s3://bucket-2/in/a.png",
        "gs://bucket/in/a.png",
    ],
)
def test_urls_outside_of_the_prefixes(url: str) -> None:
    """A URL that is below no prefix is refused, however it is written."""
    with pytest.raises(AccessDenied, match="ALLOWED_INPUT_URLS"):
        INPUTS.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example.org@evil.net/public/a.png",
        "https://user:password@images.example.org/public/a.png",
        "https://images.example.org/public/%2e%2e%2fsecret.png",
        "https://images.example.org/public/..%2fsecret.png",
        "https://images.example.org/public/..%5csecret.png",
        "https://images.example.org/public/%252e%252e/secret.png",
        "https://images.example.org/public/%25252e%25252e%25252fsecret.png",
        "https://images.example.org/public\\..\\secret.png",
        "https://images.example.org/public/a%00.png",
        "https://images.example.org:99999/public/a.png",
        "https://images.example.org:port/public/a.png",
        *(f"https://images.example.org:{port}/public/a.png" for port in ("0", "65536", "+443", "4_43", "-1", "٤٤٣")),
        *(f"http://{host}/a.png" for host in ("2130706433", "0x7f.1", "0177.0.0.1", "127.1", "0", "127.0.0.01", "1.2.3.4.5")),
        *(f"http://{host}/a.png" for host in ("[fe80::1%25eth0]", "[fe80::1%eth0]", "[v1.x]", "[]", "[127.0.0.1]", "[::1]x")),
        *(
            f"https://{host}/a.png"
            for host in ("faß.de", "βόλος.com", "examp\u200dle.org", "h%2eevil.net", "h%00", "a b", "h..")
        ),
        *(
            f"https://images.example.org/public/{name}/secret.png"
            for name in ("..;", "..;x=1", "%2e%2e;", ";..", "%c0%ae%c0%ae")
        ),
        *(
            f"https://images.example.org/public/{name}"
            for name in ("a\tb", "a?x=\ty", "a?x=\0", "a?x\r\ny", "a\x7f", "%%32e%%32e/a")
        ),
        "https://images.example.org/public/" + "a" * 8192,
        "https://images.example.org/public/\ud800.png",
        "https://example.org\u2044@images.example.org/public/a.png",
        " https://images.example.org/public/a.png",
        "https:/\\images.example.org/public/a.png",
        "s3://bucket/in/\ud800.png",
        "s3://bucket/in/a\nb.png",
        "s3://bucket/in/" + "é" * 511,
        "s3://bucket./in/a.png",
        "s3://bucket?x/in/a.png",
        "s3://bücket/in/a.png",
        "az://container/in/..\\secret.png",
        "https://images.example.org\n/public/a.png",
        "https://images..example.org/public/a.png",
        "https:///public/a.png",
        "https://[::1/a.png",
        "s3://bucket",
        "s3://bucket/",
        "s3:///in/a.png",
        "s3://bucket//in/a.png",
        "s3://bucket/in/../../other/a.png",
        "s3://bucket/in/./a.png",
        "s3://bucket/in/%2e%2e/a.png",
        "s3://bucket:443/in/a.png",
        "s3://key:secret@bucket/in/a.png",
        "s3://bucket/in/" + "x" * 1100,
        "ftp://images.example.org/public/a.png",
        "gcs://bucket/in/a.png",
    ],
)
def test_urls_that_can_mean_two_places_are_refused(url: str) -> None:
    """A URL that servers may read in different ways, or that names no place, is an invalid request without its secret."""
    with pytest.raises(InvalidRequest) as refused:
        INPUTS.check(url)
    assert "password" not in str(refused.value).replace("a user or a password", "").replace("a user, a password", "")


def test_only_a_scheme_makes_a_url() -> None:
    """A path stays a path, also one that resembles a URL."""
    assert not any(map(is_url, ("a.png", "/s3://x", "./s3://bucket/a.png", "s3:/bucket/a.png", "C:/x", "s3:bucket", "~/a")))
    assert location_of("s3://bucket/a/b.png") == ObjectPath("s3://bucket/a/b.png")


def test_places_in_a_bucket_are_paths() -> None:
    """A place in a bucket has a name, a parent and a key, and is no place on disk."""
    place = place_of("s3://bucket/out/")
    assert str(place / "a.png") == "s3://bucket/out/a.png"
    assert str((place / "a.png").with_name("b.png").parent) == "s3://bucket/out"
    assert isinstance(place, ObjectPath)
    assert (place.scheme, place.bucket, place.key) == ("s3", "bucket", "out")
    assert place != Path.cwd() / "s3:/bucket/out"
    assert not hasattr(place, "exists")
    assert str(output_files("gs://bucket/out", "https://h/%C3%A4%20b.png?x=1", "id").latent).startswith(
        "gs://bucket/out/latent_"
    )


def test_one_address_has_one_form() -> None:
    """Forms of one address or name that mean the same become equal, and others do not."""
    for written, host in {
        "http://①②⑦.0.0.1/": "127.0.0.1",
        "http://127.0.0.1./": "127.0.0.1",
        "http://[::FFFF:127.0.0.1]/": "::ffff:7f00:1",
        "http://BÜCHER.example/": "xn--bcher-kva.example",
        "http://xn--bcher-kva.example/": "xn--bcher-kva.example",
    }.items():
        place = location_of(written)
        assert isinstance(place, WebUrl)
        assert place.host == host
    place = location_of("https://h/50%/%u002e")
    assert isinstance(place, WebUrl)
    assert place.path == "/50%25/%25u002e"


def test_no_prefix_allows_nothing() -> None:
    """An empty list of prefixes refuses each URL."""
    for url in ("https://h/a.png", "s3://b/a.png", "gs://b/a.png", "az://b/a.png"):
        with pytest.raises(AccessDenied, match="ALLOWED_INPUT_URLS"):
            AllowedUrls("image_path", ()).check(url)


@pytest.mark.parametrize("folder", ["https://host/out", "s3://", "ftp://x", "s3://b/../c", "az://c/a\\b"])
def test_output_folders_that_are_none(folder: str) -> None:
    """An output folder on a web server, or one without a bucket, is an invalid request."""
    with pytest.raises(InvalidRequest, match="output_dir"):
        output_files(folder, "a.png", "id")


def test_output_folders_with_room_for_names() -> None:
    """An output folder in a bucket leaves room for the names of files; a longer one is an invalid request."""
    outputs = AllowedUrls("output_dir")
    outputs.check("s3://b/" + "x" * 768)
    with pytest.raises(InvalidRequest, match="output_dir: must have at most 768 bytes"):
        outputs.check("s3://b/" + "x" * 769)


def test_file_urls_are_paths() -> None:
    """A `file://` URL is the path in it, decoded; one of another machine is refused."""
    assert path_of_file_url("file:///a/b%20c.png") == "/a/b c.png"
    assert path_of_file_url("FILE://localhost/a") == "/a"
    assert path_of_file_url("/a%20b") == "/a%20b"
    for url in ("file://host/a", "file://a", "file:///%00", "file:///%ff"):
        with pytest.raises(ValueError, match="must"):
            path_of_file_url(url)


def test_file_urls_are_limited_as_paths(tmp_path: Path) -> None:
    """A `file://` URL of a request is checked as its path is."""
    request = parse_request({"image_path": f"file://{tmp_path}/%2e%2e/a.png"}, {})
    assert request.image_path == f"{tmp_path}/../a.png"
    with pytest.raises(AccessDenied):
        AllowedFolders("ALLOWED_INPUT_DIRS", (tmp_path,)).check(request.image_path)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "link").symlink_to(tmp_path)
    linked = parse_request({"image_path": f"file://localhost{tmp_path}/allowed/%6cink/a.png"}, {})
    assert linked.image_path == f"{tmp_path}/allowed/link/a.png"
    with pytest.raises(AccessDenied):
        AllowedFolders("ALLOWED_INPUT_DIRS", (tmp_path / "allowed",)).check(linked.image_path)


def test_secrets_of_urls_are_not_shown() -> None:
    """The query, the user and the password of a URL are cut off where it is shown or logged, and from ids the signature."""
    signed = "https://bucket.s3.amazonaws.com/a.png?X-Amz-Credential=AKIA&X-Amz-Signature=abcdef"
    assert shown(signed) == "https://bucket.s3.amazonaws.com/a.png"
    assert shown("https://user:pw@h/a.png?x=1") == "https://h/a.png"
    assert shown("https://h/..%2f?sig=abc") == "https://h/..%2f"
    assert masked(
        f"cannot read {signed}: no"
    ) == "cannot read https://bucket.s3.amazonaws.com/a.png: no" or "abcdef" not in masked(signed)
    assert lasting(signed) == shown(signed)
    assert lasting("https://h/image?id=5") == "https://h/image?id=5"
    assert stem_of(signed) == "a"
    assert stem_of("https://h/%C3%A4%20b.tar.png?x=/y.z") == "ä b.tar"


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
        ),
        *("::1", "::", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "fd00:ec2::254", "0.0.0.0"),  # noqa: S104
    ],
)
def test_private_addresses(address: str) -> None:
    """A private, loopback or link-local address is no public one, also inside of an address of version 6."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_public_addresses(address: str) -> None:
    """An address of the public internet is one."""
    assert is_public(ipaddress.ip_address(address))


def test_private_addresses_are_allowed_only_if_they_are_listed() -> None:
    """A private address may be connected to if a prefix has it, or a network; a name that leads to it does not suffice."""
    loopback, metadata = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("169.254.169.254")
    listed = AllowedUrls("image_path", ("http://127.0.0.1/",))
    assert listed.allows_address("127.0.0.1", loopback, named=True)
    assert not listed.allows_address("images.example.org", loopback, named=True)
    networks = AllowedUrls("image_path", ("http://h/",), networks=(ipaddress.IPv4Network("127.0.0.0/8"),))
    assert networks.allows_address("h", loopback, named=True)
    assert not networks.allows_address("h", metadata, named=True)
    person = AllowedUrls("image_path")
    assert person.allows_address("localhost", loopback, named=True)
    assert not person.allows_address("127.0.0.1", loopback, named=False)
    assert not person.allows_address("169.254.169.254", metadata, named=True)


def test_settings_of_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefixes are lists; a value that is no URL, or has a query, is refused; none means none in Kafka mode."""
    monkeypatch.setenv("ALLOWED_INPUT_URLS", "s3://bucket/in, https://h/x")
    monkeypatch.setenv("ALLOWED_PRIVATE_NETWORKS", "10.0.0.0/8, fd00::/8")
    settings = load_settings({})
    assert settings.allowed_input_urls == ("s3://bucket/in", "https://h/x")
    assert len(settings.allowed_private_networks) == 2
    assert AllowedUrls.of_outputs(Settings(mode="kafka")).prefixes == ()
    assert AllowedUrls.of_outputs(Settings(mode="standalone")).prefixes is None
    for wrong in ("bucket/in", "*", "https://", "https://h/?a=b", "s3://b/..", "https://u:p@h/"):
        monkeypatch.setenv("ALLOWED_INPUT_URLS", wrong)
        with pytest.raises(SettingsError, match="ALLOWED_INPUT_URLS") as refused:
            load_settings({})
        assert "u:p" not in str(refused.value)
