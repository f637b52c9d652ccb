package host

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/wsl"
)

// placed is a machine whose paths are those of WSL2.
type placed struct{ vm.Machine }

func (placed) Place(p string) (string, error)  { return wsl.Place(p) }
func (placed) Origin(p string) (string, error) { return wsl.Origin(p) }

func TestPlaceMounts(t *testing.T) {
	h, l := &Host{}, newLive(t)
	l.machine = placed{}
	l.spec.Shares = []vm.Share{shareOf(`C:\Users\ada`), shareOf(`\\server\x`), shareOf(`D:\`)}
	for in, want := range map[string]string{
		`{"HostConfig":{"Binds":["C:\\Users\\ada\\src:/src:ro","name:/x"]}}`:                  `{"HostConfig":{"Binds":["/mnt/c/Users/ada/src:/src:ro","name:/x"]}}`,
		`{"HostConfig":{"Binds":["c:/users/ADA/Src:/src"]}}`:                                  `{"HostConfig":{"Binds":["/mnt/c/Users/ada/Src:/src"]}}`,
		`{"Image":"x","hostconfig":{"binds":["D:\\a:/a"],"Memory":9007199254740993}}`:         `{"Image":"x","hostconfig":{"binds":["/mnt/d/a:/a"],"Memory":9007199254740993}}`,
		`{"HostConfig":{"Mounts":[{"Type":"bind","Source":"C:\\Users\\ada","Target":"/a"}]}}`: `{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/mnt/c/Users/ada","Target":"/a"}]}}`,
		`{"HostConfig":{"Mounts":[{"Type":"volume","Source":"v","Target":"/a"}]}}`:            `{"HostConfig":{"Mounts":[{"Type":"volume","Source":"v","Target":"/a"}]}}`,
		`{"HostConfig":{"Binds":["/mnt/c/Users/ada/x:/x"]}}`:                                  `{"HostConfig":{"Binds":["/mnt/c/Users/ada/x:/x"]}}`,
		`{"HostConfig":{"Binds":["C:\\Windows:/w"]}}`:                                         "",
		`{"HostConfig":{"Binds":["C:\\Users\\adam:/w"]}}`:                                     "",
		`{"HostConfig":{"Binds":["C:\\Users\\ada\\..\\eve:/w"]}}`:                             "",
		`{"HostConfig":{"Binds":["C:\\Users\\ada"]}}`:                                         "",
		`{"HostConfig":{"Mounts":[{"Type":"bind","Source":"E:\\x","Target":"/a"}]}}`:          "",
		`{"HostConfig":{"Binds":["/mnt/c/Windows:/w"]}}`:                                      "",
		`{"HostConfig":null}`: `{"HostConfig":null}`,
		`not json`:            `not json`,
	} {
		got, err := l.placeMounts([]byte(in))
		if err == nil {
			err = h.checkMounts(l, got)
		}
		if want == "" {
			if err == nil {
				t.Errorf("%s is taken: %s", in, got)
			}
			continue
		}
		if err != nil || !same(string(got), want) {
			t.Errorf("%s: %s %v, want %s", in, got, err, want)
		}
	}
	body, _ := l.placeMounts([]byte(`{"HostConfig":{"Binds":["C:\\Windows:/w"]}}`))
	if err := h.checkMounts(l, body); err == nil || !strings.Contains(err.Error(), `C:\Windows`) {
		t.Errorf("a folder that is not shared: %v", err)
	}
}

// same compares JSON but for the order of fields.
func same(a, b string) bool {
	if a == b {
		return true
	}
	norm := func(s string) any {
		var v any
		d := json.NewDecoder(strings.NewReader(s))
		d.UseNumber()
		if d.Decode(&v) != nil {
			return s
		}
		return v
	}
	return reflect.DeepEqual(norm(a), norm(b))
}

func FuzzPlaceMounts(f *testing.F) {
	f.Add(`{"HostConfig":{"Binds":["C:\\Users\\ada\\src:/src:ro"],"Mounts":[{"Type":"bind","Source":"C:/x"}]}}`)
	f.Fuzz(func(t *testing.T, body string) {
		l := newLive(t)
		l.machine = placed{}
		l.spec.Shares = []vm.Share{shareOf(`C:\Users\ada`)}
		got, err := l.placeMounts([]byte(body))
		if err == nil && string(got) != body && !json.Valid(got) {
			t.Fatalf("%q became %q", body, got)
		}
	})
}

// candidate is a driver that can or cannot, and may keep something.
type candidate struct {
	vm.Driver
	name      string
	err       error
	kept      bool
	probed    int
	destroyed bool
}

func (c *candidate) Name() string { return c.name }
func (c *candidate) Probe(context.Context, vm.Image, string) (vm.Host, error) {
	c.probed++
	return vm.Host{Version: c.name}, c.err
}
func (c *candidate) Keeps(context.Context, vm.Spec) (bool, error) { return c.kept, nil }
func (c *candidate) Destroy(context.Context, vm.Spec) error {
	c.kept, c.destroyed = false, true
	return nil
}

func TestChoose(t *testing.T) {
	dir := t.TempDir()
	hyperv, wsl2 := &candidate{name: "hyperv", err: fault.New(fault.Unsupported, "no Hyper-V in this Windows")}, &candidate{name: "wsl2"}
	h, err := New(Config{Place: api.VMPlace{State: dir, Run: dir}, Drivers: []vm.Driver{hyperv, wsl2}, Log: quietLog(), Computer: vm.Computer{CPUs: 2, MemoryMiB: 4096}})
	if err != nil {
		t.Fatal(err)
	}
	d, found, why, err := h.choose(t.Context(), "", vm.Image{})
	if err != nil || d != vm.Driver(wsl2) || found.Version != "wsl2" || !strings.Contains(why, "no Hyper-V") {
		t.Fatalf("%v %v %q %v", d, found, why, err)
	}
	// It stays with what it began with, and says so when that fails.
	if err := vm.WriteJSON(h.file(chosenFile), choice{"wsl2"}); err != nil {
		t.Fatal(err)
	}
	hyperv.err, wsl2.err = nil, errors.New("not today")
	if _, _, _, err = h.choose(t.Context(), "", vm.Image{}); err == nil || !strings.Contains(err.Error(), "not today") || !strings.Contains(err.Error(), "--driver") {
		t.Errorf("another driver than the one with the data: %v", err)
	}
	if d, _, _, err = h.choose(t.Context(), "hyperv", vm.Image{}); err != nil || d != vm.Driver(hyperv) {
		t.Errorf("the configured one: %v %v", d, err)
	}
	if _, _, _, err = h.choose(t.Context(), "vfkit", vm.Image{}); err == nil {
		t.Error("a driver of another platform")
	}
	// A reset counts what a driver keeps, destroys it, and chooses anew.
	wsl2.kept = true
	if kept, err := h.keeps(t.Context()); err != nil || !kept {
		t.Errorf("kept: %v %v", kept, err)
	}
	if err := h.reset(t.Context()); err != nil || !wsl2.destroyed {
		t.Errorf("reset: %v", err)
	}
	if _, err := os.Stat(h.file(chosenFile)); err == nil {
		t.Error("the choice outlived the reset")
	}
	hyperv.err = errors.New("no")
	if _, _, _, err = h.choose(t.Context(), "", vm.Image{}); err == nil || !strings.Contains(err.Error(), "hyperv: no") || !strings.Contains(err.Error(), "wsl2: not today") {
		t.Errorf("none can: %v", err)
	}
}
