package config

import (
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestParse(t *testing.T) {
	c, err := Parse([]byte("version: 1\npool: 0\nlisten: [unix:///s]\nshutdownTimeout: 1m\nregistries:\n  docker.io:\n    mirrors: [https://m.example]\n"))
	if err != nil {
		t.Fatal(err)
	}
	c.Defaults(false)
	if *c.Pool != 0 || c.Root != "/var/lib/servin" || c.Logs.MaxFiles != 3 {
		t.Errorf("defaults went wrong: %+v", c)
	}
	for doc, want := range map[string]string{
		"version: 2\n":                                 "version is 2",
		"":                                             "version is 0",
		"version: 1\nrooot: /x\n":                      "line 2: field rooot not found",
		"version: 1\nroot: x\n":                        "absolute",
		"version: 1\nlisten: [http://x]\n":             "cannot listen",
		"version: 1\npool: -1\n":                       "pool must",
		"version: 1\n---\nversion: 1\n":                "one document",
		"version: 1\nshutdownTimeout: 5\n":             "no duration",
		"version: 1\ncdiSpecDirs: [cdi]\n":             "absolute paths",
		"version: 1\nruntimes: {x: {path: y}}\n":       "absolute path",
		"version: 1\nlogs: {driver: carrier-pigeon}\n": "logs.driver",
		"version: 1\nnetwork: {pools: [{base: 10.0.0.0/8, size: 4}]}\n": "makes no sense",
	} {
		_, err := Parse([]byte(doc))
		if err == nil || !strings.Contains(err.Error(), want) || !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: want an error with %q, got %v", doc, want, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("version: 1\nroot: /x\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if c, err := Parse(data); err == nil {
			c.Defaults(false)
			if err := c.Check(); err != nil {
				t.Errorf("defaults made it wrong: %v", err)
			}
		}
	})
}
