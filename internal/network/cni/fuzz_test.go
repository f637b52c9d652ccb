package cni

import (
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/version"
)

// FuzzResult: whatever a plugin prints, decoding it ends well, and what is taken
// can be used.
func FuzzResult(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","mac":"02:00:00:00:00:01","sandbox":"/x"}],"ips":[{"address":"10.1.2.3/24","interface":0}],"routes":[{"dst":"0.0.0.0/0","gw":"10.1.2.1"}],"dns":{"nameservers":["1.1.1.1"]}}`,
		`{"cniVersion":"0.4.0","interfaces":[null],"ips":[{"version":"4","address":"10.0.0.1/8"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.1/8","gateway":"10.0.0.2","routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"fd00::1/64"}}`,
		`{"ip4":null}`, `null`, `[]`, `{}`, `{"ips":[{}]}`, `{"routes":[{"dst":"x"}]}`,
	} {
		for _, v := range version.All.SupportedVersions() {
			f.Add([]byte(s), v)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, v string) {
		typed, err := decodeTyped(b, v)
		if err != nil {
			return
		}
		r, err := fromTyped(typed, b)
		if err != nil {
			return
		}
		for _, ip := range r.Inside() {
			if !ip.Address.IsValid() || ip.Address.Addr().IsUnspecified() {
				t.Errorf("took address %v", ip)
			}
		}
		r.MAC("eth0")
		for _, s := range r.DNS.Searches {
			if strings.ContainsAny(s, " \n\x00") {
				t.Errorf("took search domain %q", s)
			}
		}
	})
}

func FuzzConf(f *testing.F) {
	f.Add([]byte(chain("1.1.0", "x", "p", `{"type":"q","capabilities":{"mac":true}}`)), true)
	f.Add([]byte(`{"name":"x","type":"p"}`), false)
	f.Add([]byte(`{"name":"x","cniVersions":["1.0.0",null],"plugins":[null]}`), true)
	f.Fuzz(func(t *testing.T, b []byte, isList bool) {
		l, err := parseList(b, isList)
		if err != nil || checkPlugins(l) != nil {
			return
		}
		for _, p := range (&list{l, ""}).network().Plugins {
			if p == "" || strings.Contains(p, "/") {
				t.Errorf("took plugin %q", p)
			}
		}
	})
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"owner":"pod","containerId":"c1","ifName":"eth0","netns":"/x","networkName":"x","cniVersion":"1.0.0","plugins":[{"type":"p"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decodeRecord(b)
		if err != nil {
			return
		}
		if strings.ContainsAny(r.base(), "/\x00") || strings.HasPrefix(r.base(), ".") {
			t.Errorf("took %q", r.base())
		}
		if _, err := r.plugins(); err != nil {
			t.Error(err)
		}
	})
}
