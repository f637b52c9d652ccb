package oci

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

func testImage() image.Resolved {
	return image.Resolved{
		Ref: "test:latest",
		Config: ocispec.ImageConfig{
			User: "www", Env: []string{"PATH=/bin", "A=image"}, Entrypoint: []string{"/entry"}, Cmd: []string{"serve"},
			WorkingDir: "srv", Labels: map[string]string{"l": "image", "m": "image"}, Volumes: map[string]struct{}{"/data": {}},
			ExposedPorts: map[string]struct{}{"80/tcp": {}}, StopSignal: "SIGQUIT",
		},
		Healthcheck: &image.Healthcheck{Test: []string{"CMD", "check"}, Interval: time.Second, Retries: 3},
		Shell:       []string{"/bin/ash", "-c"},
	}
}

func TestMerge(t *testing.T) {
	img := testImage()
	before, _ := json.Marshal(img)
	cfg := &container.Config{
		Env: []string{"A=own"}, Cmd: []string{"other"}, Labels: map[string]string{"l": "own"},
		ExposedPorts: network.PortSet{network.MustParsePort("53/udp"): {}},
		Healthcheck:  &container.HealthConfig{Retries: 7},
	}
	if err := Merge(cfg, img); err != nil {
		t.Fatal(err)
	}
	want := &container.Config{
		User: "www", Env: []string{"A=own", "PATH=/bin"}, Entrypoint: []string{"/entry"}, Cmd: []string{"other"},
		WorkingDir: "/srv", Labels: map[string]string{"l": "own", "m": "image"}, Volumes: map[string]struct{}{"/data": {}},
		ExposedPorts: network.PortSet{network.MustParsePort("53/udp"): {}, network.MustParsePort("80/tcp"): {}},
		StopSignal:   "SIGQUIT", Shell: []string{"/bin/ash", "-c"},
		Healthcheck: &container.HealthConfig{Test: []string{"CMD", "check"}, Interval: time.Second, Retries: 7},
	}
	if !reflect.DeepEqual(cfg, want) {
		t.Errorf("got  %+v\nwant %+v", cfg, want)
	}
	cfg.Env[0], cfg.Labels["m"], cfg.Healthcheck.Test[0], cfg.Entrypoint[0] = "x", "x", "x", "x"
	if after, _ := json.Marshal(img); string(after) != string(before) {
		t.Error("the image changed with the container's configuration")
	}
}

func TestMergeCommand(t *testing.T) {
	for name, c := range map[string]struct {
		entry, cmd         []string
		wantEntry, wantCmd []string
	}{
		"image's":          {nil, nil, []string{"/entry"}, []string{"serve"}},
		"own entrypoint":   {[]string{"/own"}, nil, []string{"/own"}, nil},
		"own both":         {[]string{"/own"}, []string{"a"}, []string{"/own"}, []string{"a"}},
		"no entrypoint":    {[]string{""}, []string{"a"}, nil, []string{"a"}},
		"empty entrypoint": {[]string{}, nil, []string{}, []string{"serve"}},
	} {
		cfg := &container.Config{Entrypoint: c.entry, Cmd: c.cmd}
		if err := Merge(cfg, testImage()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !reflect.DeepEqual(cfg.Entrypoint, c.wantEntry) || !reflect.DeepEqual(cfg.Cmd, c.wantCmd) {
			t.Errorf("%s: entrypoint %q command %q", name, cfg.Entrypoint, cfg.Cmd)
		}
	}
	if err := Merge(&container.Config{Entrypoint: []string{""}}, testImage()); !fault.Is(err, fault.Invalid) || err.Error() != "no command specified" {
		t.Errorf("got %v", err)
	}
	if err := Merge(&container.Config{}, image.Resolved{Config: ocispec.ImageConfig{Cmd: []string{"a"}, ExposedPorts: map[string]struct{}{"x": {}}}}); !fault.Is(err, fault.Invalid) {
		t.Errorf("bad port: %v", err)
	}
}
