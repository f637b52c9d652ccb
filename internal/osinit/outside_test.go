package osinit

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/source"
)

// TestBelieve starts a machine with encrypted data again and again.
func TestBelieve(t *testing.T) {
	stick := func(s string) source.Found {
		return source.Found{Source: "nocloud", Document: []byte(s), Outside: true}
	}
	inside := source.Found{Source: "image", Document: []byte("version: 1")}
	type start struct {
		f            source.Found
		shown, knows bool
		ok           bool
	}
	for name, starts := range map[string][]start{
		"the same stick":               {{stick("a"), false, false, true}, {stick("a"), false, false, true}},
		"another stick":                {{stick("a"), false, false, true}, {stick("b"), false, false, false}, {stick("a"), false, false, true}},
		"a stick where none was":       {{inside, false, false, true}, {stick("b"), false, false, false}},
		"where nothing was at all":     {{source.Found{}, false, false, true}, {stick("b"), false, false, false}},
		"without the stick":            {{stick("a"), false, false, true}, {inside, false, false, true}, {stick("b"), false, false, false}, {stick("a"), false, false, true}},
		"another one with a key in it": {{stick("a"), false, false, true}, {stick("b"), false, true, true}, {stick("b"), false, false, true}, {stick("a"), false, false, false}},
		"opened by a person":           {{stick("a"), false, false, true}, {stick("b"), true, false, true}, {stick("b"), false, false, true}},
	} {
		t.Run(name, func(t *testing.T) {
			note := filepath.Join(t.TempDir(), "outside")
			for i, s := range starts {
				err := believe(note, s.f, s.shown, func() bool { return s.knows })
				if (err == nil) != s.ok || err != nil && !fault.Is(err, fault.Forbidden) {
					t.Fatalf("start %d: %v", i+1, err)
				}
			}
		})
	}
	dir := t.TempDir()
	if err := believe(dir, stick("a"), false, func() bool { return false }); err == nil {
		t.Error("a note that cannot be read is no note")
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
}

// What is sealed by default is closed by what is closed in every start, also of a machine that found
// somebody else's disk; the register that an upgrade seals to is left alone.
func TestClosing(t *testing.T) {
	if slices.Contains(closing, 7) {
		t.Error("an upgrade could not seal to register 7 any more")
	}
	for _, boot := range []string{"", "unified"} {
		m := newMachine("test")
		m.cmdline = map[string]string{"boot": boot}
		if sealed := m.sealedPCRs(config.Encryption{}); !slices.ContainsFunc(sealed, func(n int) bool { return slices.Contains(closing, n) }) {
			t.Errorf("%q: what is sealed to %v stays open", boot, sealed)
		}
	}
}
