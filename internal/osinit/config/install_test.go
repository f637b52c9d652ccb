package config

import (
	"strings"
	"testing"
)

func TestInstall(t *testing.T) {
	text := "#cloudos\nversion: 1\nhostname: box # its name\nrole: node\njoin: {server: \"m1.example:6443\"}\ninstall:\n  disk: {serial: A1, minSize: 10GB, maxSize: 1.5TB, pick: smallest, wipe: true}\n" +
		"  source: https://example/cloudos.release\n  then: poweroff\nmodules: [wireguard]\n"
	d, err := Parse([]byte(text))
	if err != nil || d.Install == nil || d.Install.Disk.Serial != "A1" || !d.Install.Disk.Wipe || d.Join.Server != "m1.example:6443" {
		t.Fatalf("%+v, %v", d, err)
	}
	b, err := Installed([]byte(text))
	if err != nil || strings.Contains(string(b), "install") || !strings.Contains(string(b), "wireguard") {
		t.Fatalf("%s, %v", b, err)
	}
	if d, err := Parse(b); err != nil || d.Install != nil || d.Hostname != "box" || d.Role != "node" {
		t.Fatalf("%+v, %v", d, err)
	}
	for text, want := range map[string]string{
		"encryption: {key: tpm2, pcrs: [7], passphrase: keep-this-away}": "version: 1\nencryption: {key: tpm2, pcrs: [7]}\n",
		"encryption: {key: passphrase, passphrase: keep-this-away}":      "version: 1\n",
		"encryption: {passphrase: keep-this-away}":                       "version: 1\n",
	} {
		if b, err := Installed([]byte("version: 1\ninstall: {}\n" + text + "\n")); err != nil || string(b) != want {
			t.Errorf("%s is kept as %q, %v", text, b, err)
		}
	}
	for text, want := range map[string]string{
		"install: {disk: {wipe: true}}":               "needs the disk",
		"install: {disk: {path: sda}}":                "no device",
		"install: {disk: {path: /dev/../etc/passwd}}": "no device",
		"install: {disk: {pick: any}}":                "neither largest",
		"install: {disk: {minSize: lots}}":            "no size",
		"install: {disk: {minSize: -1}}":              "no size",
		"install: {disk: {minSize: 2TB, maxSize: 1}}": "more than",
		"install: {then: sleep}":                      "neither reboot",
		"install: {source: ftp://x/y}":                "no address",
		"install: {disc: {}}":                         "disc",
		"role: node":                                  "needs join.server",
		"join: {server: a}":                           "for the role node",
	} {
		if _, err := Parse([]byte("version: 1\n" + text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

func FuzzInstalled(f *testing.F) {
	f.Add([]byte("version: 1\ninstall: {disk: {pick: largest}}\n"))
	f.Add([]byte("install:\n- a\nversion: 1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := Parse(b); err != nil {
			return
		}
		out, err := Installed(b)
		if err != nil {
			return
		}
		if d, err := Parse(out); err != nil || d.Install != nil {
			t.Fatalf("%q became %q: %v", b, out, err)
		}
	})
}
