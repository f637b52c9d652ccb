package adopt

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"
)

func summary(steps []Step) string {
	var b strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&b, "%s %s", s.Kind, s.Name)
		if s.Skip != "" {
			fmt.Fprintf(&b, " [%s]", s.Skip)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

func TestDecide(t *testing.T) {
	from := Inventory{
		Images: []Image{{ID: "sha256:a", Tags: []string{"web:1", "web:2"}, Print: "pa"}, {ID: "sha256:b", Print: "pb"}, {ID: "sha256:c", Print: "pc"}, {ID: "sha256:p", Tags: []string{"localhost/podman-pause:4"}, Print: "pp"}},
		Volumes: []volume.Volume{{Name: "data", Driver: "local", Mountpoint: "/x"}, {Name: "nfs", Driver: "local", Options: map[string]string{"type": "nfs", "device": ":/e"}},
			{Name: "plug", Driver: "rexray"}, {Name: "have", Driver: "local"}},
		Networks: []network.Network{{Name: "bridge", Driver: "bridge"}, {Name: "own", Driver: "bridge", ID: "n1"}, {Name: "sw", Driver: "overlay", Scope: "swarm"}},
		Containers: []container.InspectResponse{
			{ID: "1111111111112222", Name: "/app", Image: "sha256:b", Config: &container.Config{Image: "web:old", Hostname: "111111111111"},
				HostConfig: &container.HostConfig{NetworkMode: "container:3333"}},
			{ID: "3333", Name: "/zdb", Image: "sha256:a", Config: &container.Config{Image: "web:1"}, HostConfig: &container.HostConfig{NetworkMode: "own"}},
		},
	}
	to := Inventory{
		Images:  []Image{{ID: "sha256:other", Tags: []string{"web:1"}, Print: "else"}, {ID: "sha256:same", Tags: []string{"web:2"}, Print: "pa"}},
		Volumes: []volume.Volume{{Name: "have"}},
	}
	want := `image sha256:b
image web:1 [another image has that name here; --replace moves the name]
image web:2 [is here already]
volume data
volume have [is here already]
volume nfs
volume plug [its driver rexray is a plugin: create it here with the same driver]
network own
network sw [it belongs to a swarm]
container zdb
container app
`
	steps := Decide(from, to, Options{Local: true})
	if got := summary(steps); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	app := steps[len(steps)-1]
	if app.create.Config.Image != "sha256:b" || app.create.Config.Hostname != "" || app.create.HostConfig.NetworkMode != "container:zdb" {
		t.Errorf("app: %+v %+v", app.create.Config, app.create.HostConfig)
	}
	if got := summary(Decide(from, to, Options{Kinds: []Kind{Images}, Replace: true})); !strings.Contains(got, "image web:1\n") || strings.Contains(got, "volume") {
		t.Errorf("replacing images alone:\n%s", got)
	}
	if got := summary(Decide(from, to, Options{Kinds: []Kind{Volumes}})); !strings.Contains(got, "volume data [its content is on another machine") {
		t.Errorf("from afar:\n%s", got)
	}
}

func TestDefineKeepsWhatMatters(t *testing.T) {
	c := container.InspectResponse{ID: "abcdefabcdef0000", Name: "/c", Image: "sha256:a",
		Config: &container.Config{Image: "i:1", Hostname: "abcdefabcdef"},
		HostConfig: &container.HostConfig{NetworkMode: "mynet", Binds: []string{"/h:/x:ro", "v:/v:rw,rprivate,nosuid,nodev,rbind"}, PidMode: "private", UTSMode: "private",
			Links: []string{"/db:/c/alias"}},
		Mounts: []container.MountPoint{{Type: mount.TypeVolume, Name: "v", Destination: "/v", RW: true}, {Type: mount.TypeVolume, Name: "hash", Destination: "/anon", RW: true}},
		NetworkSettings: &container.NetworkSettings{Networks: map[string]*network.EndpointSettings{
			"mynet":  {Aliases: []string{"abcdefabcdef", "al"}, IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.0.0.9")}},
			"second": {Aliases: []string{"other"}},
			"bridge": {},
		}}}
	s := define(&c, nil, []string{"i:1"}, map[string]network.Network{"mynet": {ID: "n"}})
	h := s.create.HostConfig
	if h.PidMode != "" || h.UTSMode != "" || !slices.Equal(h.Binds, []string{"/h:/x:ro", "v:/v"}) || !slices.Equal(h.Links, []string{"db:alias"}) {
		t.Errorf("host: %+v", h)
	}
	if len(h.Mounts) != 1 || h.Mounts[0].Source != "hash" || h.Mounts[0].Target != "/anon" {
		t.Errorf("the anonymous volume is lost: %+v", h.Mounts)
	}
	ep := s.create.Networking.EndpointsConfig["mynet"]
	if ep == nil || !slices.Equal(ep.Aliases, []string{"al"}) || ep.IPAMConfig.IPv4Address.String() != "10.0.0.9" {
		t.Errorf("first network: %+v", ep)
	}
	if len(s.others) != 2 || s.others[0].network != "bridge" || s.others[1].network != "second" {
		t.Errorf("others: %+v", s.others)
	}
}
