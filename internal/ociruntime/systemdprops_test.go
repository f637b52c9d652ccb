package ociruntime

import (
	"strings"
	"testing"
)

func TestSystemdProps(t *testing.T) {
	for note, want := range map[string]struct{ name, value string }{
		"TimeoutStopSec=uint64 7":        {"TimeoutStopUSec", "@t 7000000"},
		"TimeoutStopSec=1.5":             {"TimeoutStopUSec", "@t 1500000"},
		"TimeoutStopUSec=uint64 7000000": {"TimeoutStopUSec", "@t 7000000"},
		"CollectMode='inactive'":         {"CollectMode", `"inactive"`},
		"Sec=uint64 1":                   {"Sec", "@t 1"},
	} {
		name, value, _ := strings.Cut(note, "=")
		got, err := systemdProps(map[string]string{"org.systemd.property." + name: value, "other": "x"})
		if err != nil || len(got) != 1 || got[0].Name != want.name || got[0].Value.String() != want.value {
			t.Errorf("%s: %v %v", note, got, err)
		}
	}
	for _, note := range []string{"TimeoutStopSec='x'", "TimeoutStopSec=-1", "A_B=1", "A=", "A=["} {
		name, value, _ := strings.Cut(note, "=")
		if got, err := systemdProps(map[string]string{"org.systemd.property." + name: value}); err == nil {
			t.Errorf("%s: %v", note, got)
		}
	}
}
