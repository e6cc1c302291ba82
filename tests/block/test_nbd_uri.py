"""NBD URIs taken apart, and those that are refused."""

import pytest

from fastcbw.block.nbd_uri import PORT_DEFAULT, is_nbd_uri, parse_nbd_uri


@pytest.mark.parametrize(("text", "address", "export"), [
    ("nbd+unix:///vm?socket=/run/vm.sock", "/run/vm.sock", "vm"),
    ("nbd+unix:///vm@monday?socket=vm.sock", "vm.sock", "vm@monday"),
    ("nbd+unix://?socket=/run/a%20b", "/run/a b", ""),
    ("nbd+unix:///a%2Fb/c?socket=/s", "/s", "a/b/c"),
    ("nbd://host/disk", ("host", PORT_DEFAULT), "disk"),
    ("nbd://host", ("host", PORT_DEFAULT), ""),
    ("nbd://[::1]:10810/disk", ("::1", 10810), "disk"),
])
def test_a_uri_names_an_address_and_an_export(text, address, export):
    uri = parse_nbd_uri(text)
    assert (uri.address, uri.export, uri.text) == (address, export, text)


@pytest.mark.parametrize(("text", "why"), [
    ("nbds://host/disk", "TLS is not built yet"),
    ("nbds+unix:///disk?socket=/s", "TLS is not built yet"),
    ("nbd+vsock://2/disk", "vsock is not built yet"),
    ("nbd:unix:/run/s:exportname=x", "is no NBD URI"),
    ("nbd+unix:///disk", "names no socket"),
    ("nbd+unix:///disk?socket=", "names no socket"),
    ("nbd+unix://host/disk?socket=/s", "three slashes"),
    ("nbd:///disk", "names no host"),
    ("nbd://host:port/disk", "is no NBD URI"),
    ("nbd://host:99999/disk", "is no NBD URI"),
    ("nbd://host/disk?socket=/s", "a socket with TCP"),
    ("nbd://host/disk?tls-hostname=x", "the parameter 'tls-hostname' is not built yet"),
    ("nbd://user@host/disk", "users"),
    ("nbd://host/disk#part", "fragments"),
    ("nbd+unix:///a%00b?socket=/s", "a zero byte"),
])
def test_what_makes_no_sense_or_is_not_built_is_refused_by_name(text, why):
    assert is_nbd_uri(text)
    with pytest.raises(ValueError, match=why) as caught:
        parse_nbd_uri(text)
    assert text in str(caught.value)


@pytest.mark.parametrize("text", ["disk.img", "./nbd:disk", "/dev/nbd0", "nbd", "http://host/disk"])
def test_paths_are_no_uris(text):
    assert not is_nbd_uri(text)
