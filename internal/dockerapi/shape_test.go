package dockerapi

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	mimage "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"
	"github.com/moby/moby/api/types/system"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// at looks up a dotted path in decoded JSON; missing tells that there is no
// such field.
type missing struct{}

func at(v any, path string) any {
	for _, k := range strings.Split(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return missing{}
		}
		if v, ok = m[k]; !ok {
			return missing{}
		}
	}
	return v
}

func getJSON(t *testing.T, c *http.Client, path string) any {
	t.Helper()
	resp, body, err := get(t, c, path)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s: %d %v %s", path, resp.StatusCode, err, body)
	}
	var v any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// check compares fields: want is compared with the JSON form; "-" means that
// the field must be missing.
func check(t *testing.T, what string, v any, want map[string]any) {
	t.Helper()
	for path, w := range want {
		got := at(v, path)
		if w == "-" {
			if _, ok := got.(missing); !ok {
				t.Errorf("%s: %s is there: %v", what, path, got)
			}
			continue
		}
		if js(got) != js(w) {
			t.Errorf("%s: %s is %s, want %s", what, path, js(got), js(w))
		}
	}
}

func TestInspectByVersion(t *testing.T) {
	umask := uint32(18)
	f := &fake{}
	_, client := serveFake(t, f)
	fill := func() {
		f.inspect = container.InspectResponse{
			ID: strings.Repeat("a", 64), Image: "sha256:x",
			Config:                  &container.Config{Hostname: "host"},
			HostConfig:              &container.HostConfig{Umask: &umask},
			ImageManifestDescriptor: &ocispec.Descriptor{},
			Storage:                 &storage.Storage{RootFS: &storage.RootFSStorage{Snapshot: &storage.RootFSStorageSnapshot{Name: "overlayfs"}}},
			NetworkSettings: &container.NetworkSettings{SandboxID: "s", Networks: map[string]*network.EndpointSettings{
				"bridge": {IPAddress: netip.MustParseAddr("172.17.0.2"), IPPrefixLen: 16, EndpointID: "e"},
				"mine":   {Aliases: []string{"db"}},
			}},
		}
	}
	for path, want := range map[string]map[string]any{
		"/containers/x/json": {
			"HostConfig.Umask": 18, "NetworkSettings.IPAddress": "-", "NetworkSettings.Bridge": "-", "Config.OnBuild": "-",
			"GraphDriver": "-", "Storage.RootFS.Snapshot.Name": "overlayfs", "NetworkSettings.Networks.mine.Aliases": []string{"db"},
		},
		"/v1.55/containers/x/json": {"HostConfig.Umask": "-", "NetworkSettings.IPAddress": "-"},
		"/v1.51/containers/x/json": {
			"NetworkSettings.IPAddress": "172.17.0.2", "NetworkSettings.IPPrefixLen": 16, "NetworkSettings.Bridge": "", "NetworkSettings.MacAddress": "",
			"NetworkSettings.SandboxID": "s", "Config.OnBuild": nil, "Config.Hostname": "host", "GraphDriver.Name": "overlayfs", "Storage": "-",
			"Id": strings.Repeat("a", 64), "ImageManifestDescriptor.mediaType": "",
		},
		"/v1.44/containers/x/json": {
			"ImageManifestDescriptor": "-", "NetworkSettings.Networks.mine.Aliases": []string{"db", strings.Repeat("a", 12), "host"},
			"NetworkSettings.Networks.bridge.Aliases": nil,
		},
	} {
		fill()
		check(t, path, getJSON(t, client, path), want)
	}
}

func TestListByVersion(t *testing.T) {
	_, client := serveFake(t, &fake{})
	for path, want := range map[string]map[string]any{
		"/containers/json":       {"Health.Status": "", "HostConfig.Annotations.a": "b", "ImageManifestDescriptor.size": 0},
		"/v1.51/containers/json": {"Health": "-", "HostConfig.Annotations.a": "b"},
		"/v1.47/containers/json": {"Health": "-", "ImageManifestDescriptor": "-", "HostConfig.Annotations.a": "b"},
		"/v1.45/containers/json": {"HostConfig.Annotations": "-"},
		"/images/json":           {"Containers": 1, "VirtualSize": "-", "RepoTags": []string{}, "Descriptor.size": 0},
		"/v1.50/images/json":     {"Containers": -1, "Descriptor.size": 0},
		"/v1.47/images/json":     {"Descriptor": "-"},
		"/v1.43/images/json":     {"VirtualSize": 5, "RepoTags": []string{}},
		"/v1.42/images/json":     {"VirtualSize": 5, "RepoTags": []string{"<none>:<none>"}, "RepoDigests": []string{"<none>@<none>"}},
	} {
		v := getJSON(t, client, path)
		l, ok := v.([]any)
		if !ok || len(l) != 1 {
			t.Fatalf("%s: %v", path, v)
		}
		check(t, path, l[0], want)
	}
}

func TestImageInspectByVersion(t *testing.T) {
	f := &fake{imgInsp: mimage.InspectResponse{
		ID: "sha256:abc", Size: 5, Descriptor: &ocispec.Descriptor{}, Identity: &mimage.Identity{},
		Config: &dockerspec.DockerOCIImageConfig{ImageConfig: ocispec.ImageConfig{Cmd: []string{"sh"}}},
	}}
	_, client := serveFake(t, f)
	for path, want := range map[string]map[string]any{
		"/images/x/json":       {"Parent": "-", "Config.Env": "-", "Config.Cmd": []string{"sh"}, "GraphDriver": "-", "RepoTags": []string{}, "Identity": map[string]any{}},
		"/v1.52/images/x/json": {"Identity": "-", "Author": "-"},
		"/v1.51/images/x/json": {"Parent": "", "DockerVersion": "", "Config.Env": nil, "Config.Hostname": "-", "Config.Cmd": []string{"sh"}, "GraphDriver.Name": "overlay2", "Descriptor.size": 0},
		"/v1.49/images/x/json": {"Config.Hostname": "", "Config.Tty": false, "Config.Env": nil, "Config.Cmd": []string{"sh"}},
		"/v1.47/images/x/json": {"Descriptor": "-", "VirtualSize": "-"},
		"/v1.44/images/x/json": {"Container": "", "ContainerConfig.Tty": false},
		"/v1.43/images/x/json": {"VirtualSize": 5, "Created": "0001-01-01T00:00:00Z"},
	} {
		f.imgInsp.Created = ""
		check(t, path, getJSON(t, client, path), want)
	}
}

func TestInfoByVersion(t *testing.T) {
	_, client := serveFake(t, &fake{})
	for path, want := range map[string]map[string]any{
		"/info":       {"BridgeNfIptables": "-", "RuncCommit.ID": "r1", "RuncCommit.Expected": "-", "NRI": map[string]any{}, "FirewallBackend.Driver": "", "Runtimes.native.status.a": "b"},
		"/v1.52/info": {"NRI": "-"},
		"/v1.49/info": {"BridgeNfIptables": false, "RuncCommit.ID": "r1", "RuncCommit.Expected": "-", "FirewallBackend.Driver": ""},
		"/v1.48/info": {"RuncCommit.Expected": "r1", "FirewallBackend": "-", "RegistryConfig.AllowNondistributableArtifactsCIDRs": nil},
		"/v1.45/info": {"Containerd": "-"},
		"/v1.43/info": {"Runtimes.native.status": "-", "Runtimes.native": map[string]any{}},
	} {
		check(t, path, getJSON(t, client, path), want)
	}
}

func TestUsageByVersion(t *testing.T) {
	f := &fake{}
	_, client := serveFake(t, f)
	for path, want := range map[string]map[string]any{
		"/system/df":           {"Images": []any{map[string]any{}}, "LayersSize": 5, "ImageUsage.TotalSize": 5, "ImageUsage.Items": "-", "BuildCache": []any{}},
		"/system/df?verbose=1": {"Images": "-", "LayersSize": "-", "ImageUsage.TotalSize": 5, "ImageUsage.Items": []any{map[string]any{}}},
		"/v1.51/system/df":     {"ImageUsage": "-", "LayersSize": 5, "Images": []any{map[string]any{}}},
		"/v1.43/system/df":     {"ImageUsage": "-", "Images": []any{map[string]any{"VirtualSize": 3}}},
	} {
		f.usage = system.DiskUsage{ImageUsage: &mimage.DiskUsage{TotalSize: 5, Items: []mimage.Summary{{ID: "x", Size: 3}}}}
		v := getJSON(t, client, path)
		for k, w := range want {
			if l, ok := w.([]any); ok && len(l) == 1 {
				got, _ := at(v, k).([]any)
				if len(got) != 1 {
					t.Errorf("%s: %s is %v", path, k, at(v, k))
					continue
				}
				for f, wf := range l[0].(map[string]any) {
					check(t, path, got[0], map[string]any{f: wf})
				}
				continue
			}
			check(t, path, v, map[string]any{k: w})
		}
	}
}

func TestCreateByVersion(t *testing.T) {
	f := &fake{}
	_, client := serveFake(t, f)
	for _, c := range []struct {
		name, path, body string
		want             []string // in what the backend saw
		not              []string
		err              string
		warning          string
	}{
		{name: "defaults", path: "", body: `{"Image":"x"}`, want: []string{`"NetworkMode":"bridge"`, `"APIVersion":"1.56"`}},
		{name: "default network renamed", path: "", body: `{"Image":"x","HostConfig":{"NetworkMode":"default"},"NetworkingConfig":{"EndpointsConfig":{"default":{"Aliases":["a"]}}}}`, want: []string{`"EndpointsConfig":{"bridge":{`}, not: []string{`"default"`}},
		{name: "null endpoint", path: "", body: `{"Image":"x","NetworkingConfig":{"EndpointsConfig":{"n":null}}}`, want: []string{`"n":{`}},
		{name: "ipc of 1.39", path: "/v1.39", body: `{"Image":"x"}`, want: []string{`"IpcMode":"shareable"`}},
		{name: "console of 1.41", path: "/v1.41", body: `{"Image":"x","HostConfig":{"ConsoleSize":[1,2]}}`, want: []string{`"ConsoleSize":[0,0]`}},
		{name: "recursive read-only", path: "/v1.43", body: `{"Image":"x","HostConfig":{"Mounts":[{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true}]}}`, want: []string{`"ReadOnlyNonRecursive":true`}},
		{name: "subpath", path: "/v1.44", body: `{"Image":"x","HostConfig":{"Mounts":[{"Type":"volume","VolumeOptions":{"Subpath":"a"}}]}}`, err: "1.45"},
		{name: "image mount", path: "/v1.47", body: `{"Image":"x","HostConfig":{"Mounts":[{"Type":"image"}]}}`, err: "1.48"},
		{name: "foreign options", path: "", body: `{"Image":"x","HostConfig":{"Mounts":[{"Type":"bind","TmpfsOptions":{}}]}}`, err: "TmpfsOptions"},
		{name: "foreign options of old", path: "/v1.41", body: `{"Image":"x","HostConfig":{"Mounts":[{"Type":"bind","TmpfsOptions":{}}]}}`, not: []string{"TmpfsOptions"}},
		{name: "many networks", path: "/v1.43", body: `{"Image":"x","NetworkingConfig":{"EndpointsConfig":{"b":{},"a":{}}}}`, err: "endpoints: a, b"},
		{name: "main MAC", path: "/v1.43", body: `{"Image":"x","MacAddress":"02:00:00:00:00:07"}`, want: []string{`"bridge":{`, `02:00:00:00:00:07`}},
		{name: "main MAC warned", path: "/v1.50", body: `{"Image":"x","MacAddress":"02:00:00:00:00:07"}`, want: []string{`02:00:00:00:00:07`}, warning: "deprecated"},
		{name: "main MAC gone", path: "", body: `{"Image":"x","MacAddress":"02:00:00:00:00:07"}`, not: []string{`02:00:00:00:00:07`}},
		{name: "bad MAC", path: "/v1.50", body: `{"Image":"x","MacAddress":"nonsense"}`, err: "invalid JSON"},
		{name: "host MAC", path: "/v1.43", body: `{"Image":"x","MacAddress":"02:00:00:00:00:07","HostConfig":{"NetworkMode":"host"}}`, err: "conflicting"},
		{name: "sysctl moved", path: "/v1.46", body: `{"Image":"x","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.log_martians":"1","kernel.x":"2"}}}`, want: []string{`net.ipv4.conf.IFNAME.log_martians=1`, `"Sysctls":{"kernel.x":"2"}`}, warning: "Migrated sysctl"},
		{name: "sysctl refused", path: "", body: `{"Image":"x","HostConfig":{"Sysctls":{"net.ipv4.conf.eth0.log_martians":"1"}}}`, err: optSysctls},
		{name: "empty binding", path: "", body: `{"Image":"x","HostConfig":{"PortBindings":{"80/tcp":[]}}}`, want: []string{`"80/tcp":[{"HostIp":"","HostPort":""}]`}, warning: "80/tcp"},
		{name: "capabilities", path: "/v1.40", body: `{"Image":"x","HostConfig":{"Capabilities":["CAP_KILL"]}}`, err: "CapAdd"},
		{name: "unlimited pids", path: "", body: `{"Image":"x","HostConfig":{"PidsLimit":-1}}`, want: []string{`"PidsLimit":null`}},
		{name: "extras", path: "", body: `{"Image":"x","Labels":{"io.servin.restart-unhealthy":"true"},"HostConfig":{"UsernsMode":"auto"}}`, want: []string{`"RestartUnhealthy":true`, `"UsernsAuto":true`}},
		{name: "bad extra", path: "", body: `{"Image":"x","Labels":{"io.servin.publish-through":"maybe"}}`, err: "true or false"},
		{name: "console too large", path: "", body: `{"Image":"x","HostConfig":{"ConsoleSize":[70000,1]}}`, err: "ConsoleSize"},
		{name: "typeless mount", path: "", body: `{"Image":"x","HostConfig":{"Mounts":[{"Target":"/a"}]}}`, err: "mount type"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.calls = nil
			resp, err := client.Post("http://docker"+c.path+"/containers/create", "application/json", strings.NewReader(c.body))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			var answer struct {
				Message  string
				Warnings []string
			}
			if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
				t.Fatal(err)
			}
			if c.err != "" {
				if resp.StatusCode != 400 || !strings.Contains(answer.Message, c.err) {
					t.Errorf("%d %q, want 400 %q", resp.StatusCode, answer.Message, c.err)
				}
				return
			}
			if resp.StatusCode != 201 {
				t.Fatalf("%d %s", resp.StatusCode, answer.Message)
			}
			for _, w := range c.want {
				if !strings.Contains(f.last(), w) {
					t.Errorf("backend saw %s, want %s", f.last(), w)
				}
			}
			for _, n := range c.not {
				if strings.Contains(f.last(), n) {
					t.Errorf("backend saw %s, unwanted %s", f.last(), n)
				}
			}
			if w := strings.Join(answer.Warnings, " "); (c.warning == "") != (w == "") || !strings.Contains(w, c.warning) {
				t.Errorf("warnings %q, want %q", w, c.warning)
			}
		})
	}
}
