package adopt

import (
	"fmt"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
)

// Kind of thing that is adopted.
type Kind string

// The kinds, in the order in which they are brought over.
const (
	Images     Kind = "image"
	Volumes    Kind = "volume"
	Networks   Kind = "network"
	Containers Kind = "container"
)

// Step is one thing to bring over, or to leave with the reason.
type Step struct {
	Kind Kind
	Name string
	// Skip says why nothing is to be done; empty when something is.
	Skip string `json:",omitempty"`
	// Warnings are what will not be as it was.
	Warnings []string `json:",omitempty"`

	image   Image
	volume  volume.Volume
	network network.CreateRequest
	create  client.ContainerCreateOptions
	// imageID is the container's image there.
	imageID string
	others  []join
	// written: a container that wrote outside of its volumes.
	written bool
	id      string // of the container there
	secret  api.Secret
}

// join is a further network of a container.
type join struct {
	network  string
	endpoint *network.EndpointSettings
}

// Options of Decide.
type Options struct {
	// Kinds to adopt; nil means all.
	Kinds []Kind
	// Replace permits that a tag here is moved to the image there.
	Replace bool
	// Local: the volumes' directories there can be read on this machine.
	Local bool
	// Archives: both sides are engines of ours, which give and take volumes whole.
	Archives bool
}

// Decide compares the two sides and does nothing.
func Decide(from, to Inventory, o Options) []Step {
	wanted := func(k Kind) bool { return len(o.Kinds) == 0 || slices.Contains(o.Kinds, k) }
	var steps []Step
	if wanted(Images) {
		steps = append(steps, decideImages(from, to, o)...)
	}
	if wanted(Volumes) {
		steps = append(steps, decideVolumes(from, to, o)...)
	}
	if wanted(Networks) {
		steps = append(steps, decideNetworks(from, to)...)
	}
	if wanted(Containers) {
		steps = append(steps, decideContainers(from, to)...)
	}
	return steps
}

func decideImages(from, to Inventory, o Options) []Step {
	have, prints := map[string]Image{}, map[string]bool{}
	for _, i := range to.Images {
		prints[i.Print] = true
		for _, t := range i.Tags {
			have[t] = i
		}
	}
	used := map[string]bool{}
	for _, c := range from.Containers {
		used[c.Image] = true
	}
	var steps []Step
	for _, i := range from.Images {
		if len(i.Tags) == 0 {
			if used[i.ID] { // containers need it; the rest is leftovers of builds
				s := Step{Kind: Images, Name: i.ID, image: i}
				if prints[i.Print] {
					s.Skip = "is here already"
				}
				steps = append(steps, s)
			}
			continue
		}
		for _, t := range i.Tags {
			if strings.Contains(t, "/podman-pause:") {
				continue // Podman's own, of its pods
			}
			s := Step{Kind: Images, Name: t, image: i}
			if there, ok := have[t]; ok {
				switch {
				case there.ID == i.ID || there.Print == i.Print:
					s.Skip = "is here already"
				case !o.Replace:
					s.Skip = "another image has that name here; --replace moves the name"
				}
			}
			steps = append(steps, s)
		}
	}
	slices.SortFunc(steps, func(a, b Step) int { return strings.Compare(a.Name, b.Name) })
	return steps
}

func decideVolumes(from, to Inventory, o Options) []Step {
	var steps []Step
	for _, v := range from.Volumes {
		s := Step{Kind: Volumes, Name: v.Name, volume: v}
		switch {
		case slices.ContainsFunc(to.Volumes, func(w volume.Volume) bool { return w.Name == v.Name }):
			s.Skip = "is here already"
		case v.Driver != "local" && v.Driver != "":
			s.Skip = fmt.Sprintf("its driver %s is a plugin: create it here with the same driver", v.Driver)
		case mounted(v):
			s.Warnings = append(s.Warnings, "created with the same options; its content is where they point")
		case !o.Local && !o.Archives:
			s.Skip = "its content is on another machine: adopt there, or use volumes export and import"
		}
		steps = append(steps, s)
	}
	slices.SortFunc(steps, func(a, b Step) int { return strings.Compare(a.Name, b.Name) })
	return steps
}

// mounted tells whether a volume's content comes from elsewhere by its options.
func mounted(v volume.Volume) bool { return v.Options["device"] != "" || v.Options["type"] != "" }

// predefined networks are each engine's own.
var predefined = []string{"bridge", "host", "none", "podman", "docker_gwbridge", "ingress", "pasta", "slirp4netns"}

func decideNetworks(from, to Inventory) []Step {
	var steps []Step
	for _, n := range from.Networks {
		if slices.Contains(predefined, n.Name) {
			continue
		}
		s := Step{Kind: Networks, Name: n.Name}
		v4, v6 := n.EnableIPv4, n.EnableIPv6
		s.network = network.CreateRequest{Name: n.Name, Driver: n.Driver, EnableIPv6: &v6, Internal: n.Internal, Attachable: n.Attachable,
			Options: map[string]string{}, Labels: n.Labels}
		if hasV4(n) || v4 {
			yes := true
			s.network.EnableIPv4 = &yes
		}
		for k, val := range n.Options {
			if k == "com.docker.network.bridge.name" || strings.HasPrefix(k, "com.docker.network.bridge.default") {
				continue // the bridge there goes on existing under its name
			}
			s.network.Options[k] = val
		}
		if len(n.IPAM.Config) > 0 && (n.IPAM.Driver == "default" || n.IPAM.Driver == "" || n.IPAM.Driver == "host-local") {
			s.network.IPAM = &network.IPAM{Driver: "default", Config: n.IPAM.Config}
		}
		switch {
		case slices.ContainsFunc(to.Networks, func(m network.Network) bool { return m.Name == n.Name }):
			s.Skip = "is here already"
		case n.Scope == "swarm" || n.Driver == "overlay":
			s.Skip = "it belongs to a swarm"
		case !slices.Contains([]string{"bridge", "macvlan", "ipvlan"}, n.Driver):
			s.Skip = "its driver " + n.Driver + " is a plugin: create it here with the same driver"
		}
		steps = append(steps, s)
	}
	slices.SortFunc(steps, func(a, b Step) int { return strings.Compare(a.Name, b.Name) })
	return steps
}

func hasV4(n network.Network) bool {
	for _, c := range n.IPAM.Config {
		if c.Subnet.IsValid() && c.Subnet.Addr().Is4() {
			return true
		}
	}
	return false
}

func decideContainers(from, to Inventory) []Step {
	byID, names := map[string]string{}, map[string]bool{}
	for _, c := range from.Containers {
		byID[c.ID] = strings.TrimPrefix(c.Name, "/")
	}
	for _, c := range to.Containers {
		names[strings.TrimPrefix(c.Name, "/")] = true
	}
	tags := map[string][]string{}
	for _, i := range from.Images {
		tags[i.ID] = i.Tags
	}
	nets := map[string]network.Network{}
	for _, n := range from.Networks {
		nets[n.Name] = n
	}
	var steps []Step
	for i := range from.Containers {
		c := &from.Containers[i]
		s := define(c, byID, tags[c.Image], nets)
		switch {
		case names[s.Name]:
			s.Skip = "is here already"
		case c.Config.Labels["io.podman.annotations.infra"] != "" || strings.HasSuffix(s.Name, "-infra") && c.Config.Labels["PODMAN_SYSTEMD_UNIT"] == "" && strings.Contains(c.Config.Image, "podman-pause"):
			s.Skip = "it only holds a pod together"
		}
		steps = append(steps, s)
	}
	return ordered(steps)
}

// ordered puts containers behind those whose namespaces or volumes they use.
func ordered(steps []Step) []Step {
	slices.SortFunc(steps, func(a, b Step) int { return strings.Compare(a.Name, b.Name) })
	at := map[string]int{}
	for i, s := range steps {
		at[s.Name] = i
	}
	done := make([]bool, len(steps))
	out := make([]Step, 0, len(steps))
	var visit func(int)
	visit = func(i int) {
		if done[i] {
			return
		}
		done[i] = true
		for _, n := range needs(steps[i].create.HostConfig) {
			if j, ok := at[n]; ok {
				visit(j)
			}
		}
		out = append(out, steps[i])
	}
	for i := range steps {
		visit(i)
	}
	return out
}

// needs are the containers that one refers to.
func needs(h *container.HostConfig) []string {
	if h == nil {
		return nil
	}
	var out []string
	for _, m := range []string{string(h.NetworkMode), string(h.IpcMode), string(h.PidMode)} {
		if name, ok := strings.CutPrefix(m, "container:"); ok {
			out = append(out, name)
		}
	}
	for _, v := range h.VolumesFrom {
		name, _, _ := strings.Cut(v, ":")
		out = append(out, name)
	}
	for _, l := range h.Links {
		name, _, _ := strings.Cut(strings.TrimPrefix(l, "/"), ":")
		out = append(out, name)
	}
	return out
}
