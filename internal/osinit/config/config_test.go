package config

import (
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	whole := `version: 1
hostname: box.example
role: standalone
network:
  links:
  - {name: bond0, bond: {mode: 802.3ad, members: [eth0, eth1]}, dhcp: false}
  - {name: office, vlan: {parent: bond0, id: 12}, addresses: [192.0.2.7/24, "2001:db8::7/64"], gateway: 192.0.2.1, mtu: 9000,
     routes: [{to: 198.51.100.0/24, via: 192.0.2.9}]}
  - {mac: "52:54:00:12:34:56"}
  dns: [192.0.2.53]
  search: [example]
time: {servers: [ntp.example]}
engine: {listen: ["tcp://127.0.0.1:2375"], insecureTCP: true, logLevel: debug}
modules: [wireguard]
sysctl: {vm.swappiness: "10"}
`
	d, err := Parse([]byte(whole))
	if err != nil {
		t.Fatal(err)
	}
	if l := d.EngineListens(); len(l) != 1 || l[0] != "tcp://127.0.0.1:2375" || !strings.Contains(string(d.EngineDocument()), "version: 1") {
		t.Errorf("the engine's document is\n%s", d.EngineDocument())
	}
	if len(d.Network.Links) != 3 || d.Network.Links[1].Addresses[1].Bits() != 64 {
		t.Errorf("the network is %+v", d.Network)
	}
	if d, err := Parse([]byte(`{"version": 1, "hostname": "j"}`)); err != nil || d.Hostname != "j" {
		t.Errorf("JSON: %+v, %v", d, err)
	}
	for text, want := range map[string]string{
		"":                                                    "empty",
		"hostname: a":                                         "version is 0",
		"version: 2":                                          "version is 2",
		"version: 1\nversio: 1":                               "versio",
		"version: 1\n---\na: 1":                               "one document only",
		"version: 1\nhostname: -a":                            "no host's name",
		"version: 1\nrole: king":                              "not known",
		"version: 1\nengine: []":                              "mapping",
		"version: 1\nengine: {root: /x}":                      "system's to choose",
		"version: 1\nengine: {bogus: 1}":                      "bogus",
		"version: 1\ntrust: [x]":                              "PEM",
		"version: 1\nmodules: [../x]":                         "no module",
		"version: 1\nsysctl: {../../x: 1}":                    "no kernel setting",
		"version: 1\ntime: {servers: [\"a b\"]}":              "no server",
		"version: 1\nnetwork: {links: [{}]}":                  "neither name nor mac",
		"version: 1\nnetwork: {links: [{name: a/b}]}":         "no link's name",
		"version: 1\nnetwork: {links: [{name: a},{name: a}]}": "twice",
		"version: 1\nnetwork: {links: [{name: a, vlan: {parent: b, id: 5000}}]}":              "from 1 to 4094",
		"version: 1\nnetwork: {links: [{name: a, bond: {mode: x, members: [b]}}]}":            "mode",
		"version: 1\nnetwork: {links: [{name: a, addresses: [10.0.0.1]}]}":                    "",
		"version: 1\nnetwork: {links: [{name: a, mtu: 1}]}":                                   "MTU",
		"version: 1\nnetwork: {links: [{name: a, routes: [{to: 10.0.0.0/8, via: \"::1\"}]}]}": "same family",
		"version: 1\n" + strings.Repeat("#", MaxSize):                                         "larger",
	} {
		if _, err := Parse([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nnetwork: {links: [{name: a, addresses: [10.0.0.1/8]}]}\nengine: {logLevel: info}\n"))
	f.Add([]byte(`{"version": 1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Parse(b)
		if err == nil && d.Version != Version {
			t.Fatal("a document without a version passed")
		}
	})
}
