package ociruntime

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestFlags(t *testing.T) {
	for _, c := range []struct {
		args     []string
		verbatim bool
		left     []string
		force    bool
		bundle   string
	}{
		{[]string{"--force", "c"}, false, []string{"c"}, true, ""},
		{[]string{"c", "--force"}, false, []string{"c"}, true, ""}, // as callers write it
		{[]string{"-f", "-b", "/x", "c", "d"}, false, []string{"c", "d"}, true, "/x"},
		{[]string{"--bundle=/x", "c", "--", "--force"}, false, []string{"c", "--force"}, false, "/x"},
		{[]string{"c", "ls", "--force"}, true, []string{"c", "ls", "--force"}, false, ""},
	} {
		f := newFlags("x")
		f.boolean("force,f", "x")
		f.text("bundle,b", "", "x")
		if err := f.parse(c.args, c.verbatim); err != nil || !slices.Equal(f.args, c.left) || *f.flag["force"] != c.force || *f.str["bundle"] != c.bundle {
			t.Errorf("%v: %v %v %v %q", c.args, err, f.args, *f.flag["force"], *f.str["bundle"])
		}
	}
	if err := newFlags("x").parse([]string{"--nothing"}, false); err == nil {
		t.Error("an unknown flag was taken")
	}
}

func TestSignals(t *testing.T) {
	for s, want := range map[string]unix.Signal{"9": 9, "KILL": 9, "sigterm": 15, "SIGRTMIN+3": 37, "RTMAX-1": 63, "0": 0} {
		if got, err := parseSignal(s); err != nil || got != want {
			t.Errorf("%s: %v %v", s, got, err)
		}
	}
	for _, s := range []string{"", "65", "-1", "SIGNOTHING", "9x"} {
		if got, err := parseSignal(s); err == nil {
			t.Errorf("%q: %v", s, got)
		}
	}
}

func TestIDs(t *testing.T) {
	for id, ok := range map[string]bool{"a": true, "A_b-c.d+1": true, "": false, ".": false, "..": false, "a/b": false, "a b": false, "ä": false, strings.Repeat("x", 2000): false} {
		if (validID(id) == nil) != ok {
			t.Errorf("%q: %v", id, validID(id))
		}
	}
}

func TestSubCgroups(t *testing.T) {
	for _, args := range [][]string{{":x"}, {"cpu:a", "cpu:b"}, {"a", "b"}, {"cpu,:a"}} {
		if m, err := subCgroups(args); err == nil {
			t.Errorf("%v: %v", args, m)
		}
	}
	if m, err := subCgroups([]string{"cpu,cpuacct:a", "memory:b"}); err != nil || m["cpuacct"] != "a" || m["memory"] != "b" {
		t.Errorf("%v %v", m, err)
	}
	for sub, ok := range map[string]bool{"a": true, "/": true, "a/../b": true, "..": false, "../d-sibling": false} {
		if p, err := below("/c/d", sub); (err == nil) != ok {
			t.Errorf("%s: %s %v", sub, p, err)
		}
	}
}

// TestRecord: what is given to a process stays out of records.
func TestRecord(t *testing.T) {
	doc := []byte(`{"ociVersion":"1.3.0","process":{"args":["a"],"env":["SECRET=x"],"cwd":"/","user":{"uid":7}},"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ALLOW"}},"x":{"y":1}}`)
	got, err := without(doc, "process", "args", "env")
	if err == nil {
		got, err = without(got, "linux", "seccomp")
	}
	var s specs.Spec
	if err != nil || bytes.Contains(got, []byte("SECRET")) || bytes.Contains(got, []byte("SCMP")) || json.Unmarshal(got, &s) != nil || s.Process.User.UID != 7 || s.Process.Cwd != "/" {
		t.Fatalf("%s %v", got, err)
	}
}

func TestVersionNumber(t *testing.T) {
	for v, want := range map[string]string{"v1.2.3": "1.2.3", "1.2.3-4-gabc": "1.2.3-4-gabc", "abc123": "0.0.0-abc123", "dev": "0.0.0-dev"} {
		if got := numbered(v); got != want {
			t.Errorf("%s: %s", v, got)
		}
	}
}
