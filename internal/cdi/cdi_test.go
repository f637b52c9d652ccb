package cdi

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const nvidia = `cdiVersion: "0.6.0"
kind: nvidia.com/gpu
containerEdits:
  env: [NVIDIA_VISIBLE_DEVICES=void]
  hooks:
  - hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
    args: [nvidia-cdi-hook, update-ldcache]
devices:
- name: "0"
  containerEdits: {deviceNodes: [{path: /dev/nvidia0, hostPath: /dev/null}]}
- name: "1"
  containerEdits: {deviceNodes: [{path: /dev/nvidia1, hostPath: /dev/zero}]}
- name: all
  containerEdits: {deviceNodes: [{path: /dev/nvidia0, hostPath: /dev/null}, {path: /dev/nvidia1, hostPath: /dev/zero}]}
`

const broadcom = `{"cdiVersion":"0.5.0","kind":"vendor.com/net","devices":[
 {"name":"eth","containerEdits":{"env":["NIC=1"],"mounts":[{"hostPath":"/lib/nic","containerPath":"/nic","options":["ro","bind"]}]}},
 {"name":"gone","containerEdits":{"env":["HALF=1"],"deviceNodes":[{"path":"/dev/servin-no-such-device"}]}}]}`

func injector(t *testing.T, files map[string]string) *Injector {
	t.Helper()
	dir := t.TempDir()
	for n, s := range files {
		if err := os.WriteFile(filepath.Join(dir, n), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return New([]string{filepath.Join(dir, "missing"), dir})
}

func spec() *specs.Spec {
	return &specs.Spec{
		Process: &specs.Process{Env: []string{"A=1"}},
		Linux:   &specs.Linux{Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}}},
	}
}

func gpus(count int, ids ...string) []container.DeviceRequest {
	return []container.DeviceRequest{{Count: count, DeviceIDs: ids, Capabilities: [][]string{{"gpu"}}}}
}

func TestInject(t *testing.T) {
	i := injector(t, map[string]string{"nvidia.yaml": nvidia, "net.json": broadcom, "broken.yaml": "kind: ["})
	for name, c := range map[string]struct {
		requests []container.DeviceRequest
		devices  []string
		env      string
	}{
		"all gpus":  {gpus(-1), []string{"/dev/nvidia0", "/dev/nvidia1"}, "NVIDIA_VISIBLE_DEVICES=void"},
		"one gpu":   {gpus(1), []string{"/dev/nvidia0"}, "NVIDIA_VISIBLE_DEVICES=void"},
		"by id":     {gpus(0, "1"), []string{"/dev/nvidia1"}, "NVIDIA_VISIBLE_DEVICES=void"},
		"by driver": {[]container.DeviceRequest{{Driver: "nvidia", Count: -1}}, []string{"/dev/nvidia0", "/dev/nvidia1"}, "A=1"},
		"qualified": {[]container.DeviceRequest{{Driver: "cdi", DeviceIDs: []string{"vendor.com/net=eth", "vendor.com/net=eth"}}}, nil, "NIC=1"},
	} {
		s := spec()
		if err := i.Inject(t.Context(), s, c.requests); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got []string
		for _, d := range s.Linux.Devices {
			got = append(got, d.Path)
		}
		slices.Sort(got)
		if !slices.Equal(got, c.devices) || !slices.Contains(s.Process.Env, c.env) || len(s.Linux.Resources.Devices) != 1+len(c.devices) {
			t.Errorf("%s: devices %v, env %v, rules %d", name, got, s.Process.Env, len(s.Linux.Resources.Devices))
		}
		if strings.Contains(name, "gpu") && (s.Hooks == nil || len(s.Hooks.CreateContainer) != 1) {
			t.Errorf("%s: hooks %+v", name, s.Hooks)
		}
	}
}

func TestInjectRefusesAndChangesNothing(t *testing.T) {
	i := injector(t, map[string]string{"nvidia.yaml": nvidia, "net.json": broadcom, "broken.yaml": "kind: ["})
	none := injector(t, nil)
	cdi := func(ids ...string) []container.DeviceRequest {
		return []container.DeviceRequest{{Driver: "cdi", DeviceIDs: ids}}
	}
	for name, c := range map[string]struct {
		i        *Injector
		requests []container.DeviceRequest
		want     string
	}{
		"unknown device": {i, cdi("vendor.com/net=no"), "unresolvable CDI devices vendor.com/net=no"},
		"broken spec":    {i, cdi("vendor.com/net=no"), "broken.yaml"},
		"half way":       {i, cdi("vendor.com/net=gone"), "servin-no-such-device"},
		"no spec":        {none, gpus(-1), `could not select device driver "" with capabilities: [[gpu]]`},
		"too many":       {i, gpus(3), "nvidia.com/gpu=2"},
		"both":           {i, gpus(2, "0"), "cannot set both Count and DeviceIDs"},
		"other vendor":   {i, []container.DeviceRequest{{Driver: "amd", Count: -1}}, "could not select device driver"},
		"not a gpu":      {i, []container.DeviceRequest{{Count: 1, Capabilities: [][]string{{"tpu"}}}}, "could not select device driver"},
		"bad name":       {i, cdi("/dev/null"), "invalid CDI device name"},
		"count":          {i, []container.DeviceRequest{{Driver: "cdi", Count: 1}}, "unexpected count"},
		"huge count":     {i, gpus(1 << 30), "invalid count"},
	} {
		s := spec()
		before, _ := json.Marshal(s)
		err := c.i.Inject(t.Context(), s, c.requests)
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
		if after, _ := json.Marshal(s); string(after) != string(before) {
			t.Errorf("%s: the spec changed to %s", name, after)
		}
	}
}

func TestWanted(t *testing.T) {
	hc := &container.HostConfig{}
	hc.Devices = []container.DeviceMapping{{PathOnHost: "vendor.com/net=eth"}, {PathOnHost: "/dev/fuse"}}
	hc.DeviceRequests = gpus(1)
	requests, plain := Wanted(hc)
	if len(requests) != 2 || requests[1].DeviceIDs[0] != "vendor.com/net=eth" || len(plain) != 1 || plain[0].PathOnHost != "/dev/fuse" {
		t.Errorf("got %+v %+v", requests, plain)
	}
	names, err := injector(t, map[string]string{"net.json": broadcom}).Devices(t.Context())
	if err != nil || !slices.Equal(names, []string{"vendor.com/net=eth", "vendor.com/net=gone"}) {
		t.Errorf("got %v %v", names, err)
	}
}
