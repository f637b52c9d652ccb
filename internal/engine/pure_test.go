package engine

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	mcontainer "github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

func TestStatus(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for want, s := range map[string]container.State{
		"Created":               {Status: mcontainer.StateCreated},
		"Up 5 minutes":          {Status: mcontainer.StateRunning, StartedAt: ago(5 * time.Minute)},
		"Up 5 minutes (Paused)": {Status: mcontainer.StatePaused, StartedAt: ago(5 * time.Minute)},
		"Up 2 hours (healthy)":  {Status: mcontainer.StateRunning, StartedAt: ago(2 * time.Hour), Health: &mcontainer.Health{Status: mcontainer.Healthy}},
		"Up Less than a second (health: starting)": {Status: mcontainer.StateRunning, StartedAt: now, Health: &mcontainer.Health{Status: mcontainer.Starting}},
		"Exited (0) 2 hours ago":                   {Status: mcontainer.StateExited, FinishedAt: ago(2 * time.Hour)},
		"Exited (137) 3 days ago":                  {Status: mcontainer.StateExited, FinishedAt: ago(72 * time.Hour), ExitCode: 137},
		"Restarting (1) 4 seconds ago":             {Status: mcontainer.StateRestarting, FinishedAt: ago(4 * time.Second), ExitCode: 1},
		"Removal In Progress":                      {Status: mcontainer.StateRemoving},
		"Dead":                                     {Status: mcontainer.StateDead},
	} {
		if got := status(s, now); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestLogSettings(t *testing.T) {
	e := &Engine{cfg: Config{LogMaxSize: 10 << 20, LogMaxFiles: 3}}
	for _, c := range []struct {
		driver string
		opts   map[string]string
		want   runtime.Log
	}{
		{"json-file", nil, runtime.Log{Format: "json-file", MaxSize: 10 << 20, MaxFiles: 3}},
		{"json-file", map[string]string{"max-size": "1k", "max-file": "7", "labels": "a"}, runtime.Log{Format: "json-file", MaxSize: 1024, MaxFiles: 7}},
		{"json-file", map[string]string{"max-size": "-1"}, runtime.Log{Format: "json-file", MaxFiles: 3}},
		{"k8s-file", map[string]string{"mode": "non-blocking", "max-buffer-size": "2m"}, runtime.Log{Format: "k8s-file", MaxSize: 10 << 20, MaxFiles: 3, NonBlocking: true, BufferSize: 2 << 20}},
		{"local", nil, runtime.Log{Format: "json-file", MaxSize: 20 << 20, MaxFiles: 5}},
		{"none", nil, runtime.Log{Format: "none"}},
	} {
		got, err := e.logSettings(mcontainer.LogConfig{Type: c.driver, Config: c.opts})
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s %v: got %+v, %v", c.driver, c.opts, got, err)
		}
	}
	for _, c := range []struct {
		driver string
		opts   map[string]string
	}{
		{"gelf", nil}, {"json-file", map[string]string{"max-size": "x"}}, {"json-file", map[string]string{"max-file": "0"}},
		{"json-file", map[string]string{"mode": "fast"}}, {"json-file", map[string]string{"nope": "1"}}, {"json-file", map[string]string{"max-buffer-size": "-5"}},
	} {
		if _, err := e.logSettings(mcontainer.LogConfig{Type: c.driver, Config: c.opts}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s %v: %v", c.driver, c.opts, err)
		}
	}
}

func record(name string, change func(r *container.Record)) *container.Record {
	r := &container.Record{ID: strings.Repeat("a", 64), Name: name, Created: time.Unix(1000, 0), Config: &mcontainer.Config{}, HostConfig: &mcontainer.HostConfig{},
		State: container.State{Status: mcontainer.StateRunning}}
	if change != nil {
		change(r)
	}
	return r
}

func TestEndpoints(t *testing.T) {
	e := &Engine{}
	one := func(names ...string) *network.NetworkingConfig {
		m := map[string]*network.EndpointSettings{}
		for _, n := range names {
			m[n] = &network.EndpointSettings{Links: []string{n}}
		}
		return &network.NetworkingConfig{EndpointsConfig: m}
	}
	for name, c := range map[string]struct {
		mode mcontainer.NetworkMode
		conf *network.NetworkingConfig
		want []string
		bad  bool
	}{
		"default":            {"", nil, []string{"bridge"}, false},
		"default named":      {"default", one("default"), []string{"bridge"}, false},
		"user's":             {"web", nil, []string{"web"}, false},
		"two":                {"web", one("web", "db"), []string{"web", "db"}, false},
		"only configured":    {"default", one("web"), []string{"web"}, false},
		"container":          {"container:x", nil, nil, false},
		"container and more": {"container:x", one("web"), nil, true},
		"host and more":      {"host", one("web"), nil, true},
		"none":               {"none", nil, []string{"none"}, false},
	} {
		got, err := e.endpoints(&mcontainer.HostConfig{NetworkMode: c.mode}, c.conf)
		if c.bad != (err != nil) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if len(got) != len(c.want) && !c.bad {
			t.Errorf("%s: got %v", name, got)
		}
		for _, w := range c.want {
			if got[w] == nil {
				t.Errorf("%s: lacks %s", name, w)
			}
		}
	}
	for _, predefined := range []string{"bridge", "none", "host"} {
		conf := one(predefined)
		conf.EndpointsConfig[predefined].Aliases = []string{"web"}
		if _, err := e.endpoints(&mcontainer.HostConfig{NetworkMode: mcontainer.NetworkMode(predefined)}, conf); !fault.Is(err, fault.Invalid) {
			t.Errorf("an alias on network %s: %v", predefined, err)
		}
	}
	conf := one("bridge")
	conf.EndpointsConfig["bridge"].IPAMConfig = &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("172.17.0.9")}
	if _, err := e.endpoints(&mcontainer.HostConfig{NetworkMode: "bridge"}, conf); !fault.Is(err, fault.Invalid) {
		t.Errorf("address on the default bridge: %v", err)
	}
}

func TestSortedEndpoints(t *testing.T) {
	r := record("x", func(r *container.Record) { r.HostConfig.NetworkMode = "m" })
	eps := map[string]*network.EndpointSettings{"a": {}, "z": {GwPriority: 5}, "m": {}, "b": {}}
	if got := sortedEndpoints(r, eps); !reflect.DeepEqual(got, []string{"m", "z", "a", "b"}) {
		t.Errorf("got %v", got)
	}
}

func TestListFilter(t *testing.T) {
	e := &Engine{names: nil}
	r := record("web", func(r *container.Record) {
		r.Config.Labels = map[string]string{"a": "1", "b": ""}
		r.Config.ExposedPorts = network.PortSet{network.MustParsePort("80/tcp"): {}}
		r.Ports = network.PortMap{network.MustParsePort("80/tcp"): {{HostPort: "8080"}}}
		r.Attached = map[string]*network.EndpointSettings{"net1": {NetworkID: "abcdef"}}
		r.State.Health = &mcontainer.Health{Status: mcontainer.Healthy}
	})
	stopped := record("old", func(r *container.Record) {
		r.State = container.State{Status: mcontainer.StateExited, ExitCode: 3}
	})
	set := func(v ...string) map[string]bool {
		m := map[string]bool{}
		for _, s := range v {
			m[s] = true
		}
		return m
	}
	for name, c := range map[string]struct {
		o    ListOptions
		r    *container.Record
		want bool
	}{
		"running":        {ListOptions{}, r, true},
		"stopped hidden": {ListOptions{}, stopped, false},
		"stopped, all":   {ListOptions{All: true}, stopped, true},
		"status":         {ListOptions{Filters: Filters{"status": set("exited")}}, stopped, true},
		"other status":   {ListOptions{Filters: Filters{"status": set("exited")}}, r, false},
		"exited":         {ListOptions{All: true, Filters: Filters{"exited": set("3")}}, stopped, true},
		"exited hidden":  {ListOptions{Filters: Filters{"exited": set("3")}}, stopped, false},
		"exited other":   {ListOptions{Filters: Filters{"exited": set("4")}}, stopped, false},
		"label":          {ListOptions{Filters: Filters{"label": set("a=1", "b")}}, r, true},
		"label value":    {ListOptions{Filters: Filters{"label": set("a=2")}}, r, false},
		"name":           {ListOptions{Filters: Filters{"name": set("^/we")}}, r, true},
		"name other":     {ListOptions{Filters: Filters{"name": set("x$")}}, r, false},
		"id":             {ListOptions{Filters: Filters{"id": set("aaaa")}}, r, true},
		"publish":        {ListOptions{Filters: Filters{"publish": set("8070-8090")}}, r, true},
		"publish inside": {ListOptions{Filters: Filters{"publish": set("80")}}, r, false},
		"publish udp":    {ListOptions{Filters: Filters{"publish": set("80/udp")}}, r, false},
		"expose":         {ListOptions{Filters: Filters{"expose": set("80/tcp")}}, r, true},
		"network":        {ListOptions{Filters: Filters{"network": set("net1")}}, r, true},
		"network id":     {ListOptions{Filters: Filters{"network": set("abc")}}, r, true},
		"network other":  {ListOptions{Filters: Filters{"network": set("net2")}}, r, false},
		"health":         {ListOptions{Filters: Filters{"health": set("healthy")}}, r, true},
		"health none":    {ListOptions{All: true, Filters: Filters{"health": set("none")}}, stopped, true},
		"is-task false":  {ListOptions{Filters: Filters{"is-task": set("false")}}, r, true},
		"is-task":        {ListOptions{Filters: Filters{"is-task": set("true")}}, r, false},
	} {
		f, err := e.listFilter(c.o)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got := f.match(c.r); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	for k, v := range map[string]string{"status": "asleep", "exited": "x", "health": "fine", "publish": "p", "nope": "1", "name": "(", "is-task": "maybe"} {
		if _, err := e.listFilter(ListOptions{Filters: Filters{k: set(v)}}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s=%s: %v", k, v, err)
		}
	}
}

func TestEventFilter(t *testing.T) {
	m := events.Message{Type: events.ContainerEventType, Action: "health_status: healthy", Scope: "local",
		Actor: events.Actor{ID: "abcdef", Attributes: map[string]string{"name": "web", "image": "busybox", "l": "1"}}}
	set := func(v string) map[string]bool { return map[string]bool{v: true} }
	for name, c := range map[string]struct {
		f    Filters
		want bool
	}{
		"none":       {nil, true},
		"type":       {Filters{"type": set("container")}, true},
		"other type": {Filters{"type": set("image")}, false},
		"event":      {Filters{"event": set("health_status")}, true},
		"full event": {Filters{"event": set("health_status: healthy")}, true},
		"other":      {Filters{"event": set("die")}, false},
		"name":       {Filters{"container": set("web")}, true},
		"prefix":     {Filters{"container": set("abcd")}, true},
		"not":        {Filters{"container": set("db")}, false},
		"label":      {Filters{"label": set("l=1")}, true},
		"image":      {Filters{"image": set("busybox")}, true},
		"or":         {Filters{"container": set("db"), "image": set("busybox")}, true},
	} {
		f, err := eventFilter(c.f)
		if err != nil || f(m) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := eventFilter(Filters{"x": set("y")}); !fault.Is(err, fault.Invalid) {
		t.Errorf("unknown filter: %v", err)
	}
}

func TestParseTime(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for in, want := range map[string]time.Time{
		"10m": now.Add(-10 * time.Minute), "999999": time.Unix(999999, 0), "1.5": time.Unix(1, 500_000_000), "2026-01-02T03:04:05Z": time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
	} {
		if got, err := parseTime(in, now); err != nil || !got.Equal(want) {
			t.Errorf("%s: %v, %v", in, got, err)
		}
	}
	if _, err := parseTime("yesterday", now); err == nil {
		t.Error("yesterday is a time")
	}
}

func TestHostsAndResolvConf(t *testing.T) {
	e := &Engine{}
	r := record("x", func(r *container.Record) {
		r.Config.Hostname, r.Config.Domainname = "box", "example.org"
		r.HostConfig.ExtraHosts = []string{"a:1.2.3.4", "b=::5", "gw:host-gateway"}
		r.HostConfig.DNSSearch = []string{"."}
		r.HostConfig.DNSOptions = []string{"ndots:2"}
	})
	eps := map[string]*network.EndpointSettings{"bridge": {IPAddress: netip.MustParseAddr("172.17.0.2"), Gateway: netip.MustParseAddr("172.17.0.1")}}
	got := string(e.hosts(r, eps, nil))
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "1.2.3.4\ta\n", "::5\tb\n", "172.17.0.1\tgw\n", "172.17.0.2\tbox.example.org box\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("hosts lacks %q:\n%s", want, got)
		}
	}
	if got := string(e.resolvConf(r, []string{"127.0.0.11"})); got != "nameserver 127.0.0.11\noptions ndots:2\n" {
		t.Errorf("resolv.conf: %q", got)
	}
	r.HostConfig.DNS = []netip.Addr{netip.MustParseAddr("9.9.9.9")}
	if got := string(e.resolvConf(r, nil)); !strings.HasPrefix(got, "nameserver 9.9.9.9\n") {
		t.Errorf("resolv.conf: %q", got)
	}
}

func TestWithoutMountPoints(t *testing.T) {
	ch := func(k mcontainer.ChangeType, p string) mcontainer.FilesystemChange {
		return mcontainer.FilesystemChange{Kind: k, Path: p}
	}
	add, mod := mcontainer.ChangeAdd, mcontainer.ChangeModify
	got := withoutMountPoints(record("x", nil), []mcontainer.FilesystemChange{
		ch(add, "/dev"), ch(add, "/dev/pts"), ch(mod, "/etc"), ch(add, "/etc/hosts"), ch(mod, "/usr"), ch(add, "/usr/x"), ch(add, "/proc"),
	})
	if want := []mcontainer.FilesystemChange{ch(mod, "/usr"), ch(add, "/usr/x")}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
	got = withoutMountPoints(record("x", nil), []mcontainer.FilesystemChange{ch(mod, "/etc"), ch(add, "/etc/hosts"), ch(add, "/etc/mine")})
	if want := []mcontainer.FilesystemChange{ch(mod, "/etc"), ch(add, "/etc/mine")}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %v", got)
	}
}

func TestMergeResources(t *testing.T) {
	have := mcontainer.Resources{Memory: 100, MemorySwap: 200, CPUShares: 5}
	if err := mergeResources(&have, &mcontainer.Resources{Memory: 150, NanoCPUs: 7}); err != nil || have.Memory != 150 || have.CPUShares != 5 || have.NanoCPUs != 7 {
		t.Errorf("%+v, %v", have, err)
	}
	if err := mergeResources(&have, &mcontainer.Resources{Memory: 300}); !fault.Is(err, fault.Invalid) {
		t.Errorf("more memory than with swap: %v", err)
	}
	if err := mergeResources(&have, &mcontainer.Resources{CPUQuota: 9}); !fault.Is(err, fault.Conflict) {
		t.Errorf("quota beside NanoCPUs: %v", err)
	}
}
