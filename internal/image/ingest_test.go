package image

import (
	"os"
	"path/filepath"
	"testing"
)

func TestDropTornIngests(t *testing.T) {
	dir := t.TempDir()
	for name, files := range map[string]map[string]string{
		"whole": {"ref": "layer-1", "startedat": "x", "data": "half"}, "unborn": {"ref": "layer-2", "data": ""}, "dataless": {"ref": "layer-3", "startedat": "x", "total": "5", "updatedat": "x"}, "torn": {"startedat": "x"}, "empty": {"ref": ""}, "bare": {},
	} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		for f, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name, f), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := dropTornIngests(dir); err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Name() != "whole" {
		t.Errorf("left: %v", list)
	}
	if err := dropTornIngests(filepath.Join(dir, "none")); err != nil {
		t.Error(err)
	}
}
