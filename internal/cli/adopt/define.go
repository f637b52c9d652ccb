package adopt

import (
	"maps"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
)

// define makes the request that creates a container like c.
func define(c *container.InspectResponse, byID map[string]string, tags []string, nets map[string]network.Network) Step {
	name := strings.TrimPrefix(c.Name, "/")
	s := Step{Kind: Containers, Name: name, imageID: c.Image, id: c.ID}
	cfg, host := *c.Config, *c.HostConfig

	// The name it was made from, while that still means the same image.
	s.create.Name = name
	if !slices.Contains(tags, cfg.Image) && !slices.Contains(tags, cfg.Image+":latest") {
		cfg.Image = c.Image
		if len(tags) > 0 {
			cfg.Image = tags[0]
		}
	}
	if len(c.ID) >= 12 && cfg.Hostname == c.ID[:12] {
		cfg.Hostname = "" // was made up from the id
	}

	// What belongs to the other engine or its host state.
	host.ContainerIDFile, host.Cgroup = "", ""
	host.Runtime, host.Isolation = "", ""
	if host.CgroupParent == "machine.slice" || strings.HasPrefix(host.CgroupParent, "/libpod") {
		host.CgroupParent = ""
	}
	host.MaskedPaths, host.ReadonlyPaths = nil, nil
	if host.Privileged {
		s.Warnings = append(s.Warnings, "it is privileged, here too")
	} else if len(c.HostConfig.MaskedPaths) == 0 && c.HostConfig.MaskedPaths != nil {
		host.MaskedPaths, host.ReadonlyPaths = []string{}, []string{} // --security-opt systempaths=unconfined
	}
	switch host.LogConfig.Type {
	case "journald", "k8s-file", "none", "json-file", "local", "syslog", "fluentd":
		if host.LogConfig.Type == "k8s-file" {
			host.LogConfig.Config = nil // Podman's path of its own file
		}
	case "":
	default:
		s.Warnings = append(s.Warnings, "its log driver "+host.LogConfig.Type+" is not known here; the default is used")
		host.LogConfig = container.LogConfig{}
	}
	// Podman's words for what Docker leaves empty.
	if host.PidMode == "private" {
		host.PidMode = ""
	}
	if host.UTSMode == "private" {
		host.UTSMode = ""
	}
	if host.UsernsMode == "private" {
		host.UsernsMode = ""
	}
	for i, u := range host.Ulimits {
		if name, ok := strings.CutPrefix(u.Name, "RLIMIT_"); ok {
			c := *u
			c.Name = strings.ToLower(name)
			host.Ulimits[i] = &c
		}
	}
	for i, b := range host.Binds {
		host.Binds[i] = bind(b)
	}
	named := func(mode string) string {
		if id, ok := strings.CutPrefix(mode, "container:"); ok && byID[id] != "" {
			return "container:" + byID[id]
		}
		return mode
	}
	host.NetworkMode = container.NetworkMode(named(string(host.NetworkMode)))
	host.IpcMode = container.IpcMode(named(string(host.IpcMode)))
	host.PidMode = container.PidMode(named(string(host.PidMode)))
	for i, v := range host.VolumesFrom {
		from, mode, ok := strings.Cut(v, ":")
		if byID[from] != "" {
			from = byID[from]
		}
		if ok {
			from += ":" + mode
		}
		host.VolumesFrom[i] = from
	}
	for i, l := range host.Links { // "/other:/this/alias"
		if from, to, ok := strings.Cut(l, ":"); ok {
			host.Links[i] = strings.TrimPrefix(from, "/") + ":" + to[strings.LastIndexByte(to, '/')+1:]
		}
	}
	switch m := string(host.NetworkMode); {
	case m == "default" || m == "podman" || m == "pasta" || m == "slirp4netns" || strings.HasPrefix(m, "pasta:") || strings.HasPrefix(m, "slirp4netns:"):
		host.NetworkMode = "bridge"
	}
	if host.NetworkMode.IsContainer() { // these are the other container's
		cfg.Hostname, cfg.Domainname, cfg.ExposedPorts = "", "", nil
		host.PortBindings, host.PublishAllPorts, host.Links = nil, false, nil
		host.DNS, host.DNSOptions, host.DNSSearch, host.ExtraHosts = nil, nil, nil, nil
	}
	if host.UTSMode.IsHost() || host.NetworkMode.IsHost() {
		cfg.Hostname, cfg.Domainname = "", ""
	}
	s.volumes(c, &host)

	s.networks(c, &host, nets)
	if n := c.SizeRw; n != nil && *n > 0 {
		s.written = true
		s.Warnings = append(s.Warnings, "files that it wrote outside volumes stay behind: commit it to an image there to bring them")
	}
	s.create.Config, s.create.HostConfig = &cfg, &host
	return s
}

// bind leaves out of a bind's options those that are defaults of mounts.
func bind(b string) string {
	parts := strings.SplitN(b, ":", 3)
	if len(parts) < 3 {
		return b
	}
	var keep []string
	for _, o := range strings.Split(parts[2], ",") {
		switch o {
		case "rw", "rbind", "bind", "rprivate", "nosuid", "nodev", "suid", "dev", "exec":
		default:
			keep = append(keep, o)
		}
	}
	if len(keep) == 0 {
		return parts[0] + ":" + parts[1]
	}
	return parts[0] + ":" + parts[1] + ":" + strings.Join(keep, ",")
}

// volumes keeps the data of volumes that the definition does not name.
func (s *Step) volumes(c *container.InspectResponse, host *container.HostConfig) {
	covered := map[string]bool{}
	for _, b := range host.Binds {
		if parts := strings.SplitN(b, ":", 3); len(parts) >= 2 {
			covered[parts[1]] = true
		}
	}
	for _, m := range host.Mounts {
		if m.Source != "" || m.Type != mount.TypeVolume {
			covered[m.Target] = true
		}
	}
	var mounts []mount.Mount
	for _, m := range host.Mounts {
		if covered[m.Target] {
			mounts = append(mounts, m)
		}
	}
	host.Mounts = mounts
	for _, m := range c.Mounts {
		if m.Type == mount.TypeVolume && m.Name != "" && !covered[m.Destination] && !inherited(host, m.Destination, c) {
			host.Mounts = append(host.Mounts, mount.Mount{Type: mount.TypeVolume, Source: m.Name, Target: m.Destination, ReadOnly: !m.RW})
		}
	}
}

// inherited: with --volumes-from nobody can tell whose volume it is; both share it.
func inherited(host *container.HostConfig, dst string, c *container.InspectResponse) bool {
	_, own := c.Config.Volumes[dst]
	return len(host.VolumesFrom) > 0 && !own
}

// networks sets the first network at creation and the others as joins.
func (s *Step) networks(c *container.InspectResponse, host *container.HostConfig, nets map[string]network.Network) {
	if c.NetworkSettings == nil || host.NetworkMode.IsHost() || host.NetworkMode.IsNone() || host.NetworkMode.IsContainer() {
		return
	}
	mode := string(host.NetworkMode)
	for _, name := range slices.Sorted(maps.Keys(c.NetworkSettings.Networks)) {
		there := c.NetworkSettings.Networks[name]
		if there == nil {
			continue
		}
		ep := &network.EndpointSettings{IPAMConfig: there.IPAMConfig, Links: there.Links, DriverOpts: there.DriverOpts, GwPriority: there.GwPriority}
		for _, a := range there.Aliases {
			if a != s.Name && !(len(a) == 12 && strings.HasPrefix(c.ID, a)) {
				ep.Aliases = append(ep.Aliases, a)
			}
		}
		if ep.IPAMConfig != nil && !ep.IPAMConfig.IPv4Address.IsValid() && !ep.IPAMConfig.IPv6Address.IsValid() && len(ep.IPAMConfig.LinkLocalIPs) == 0 {
			ep.IPAMConfig = nil
		}
		own := name
		if slices.Contains(predefined, name) {
			own = "bridge"
			ep.Aliases, ep.IPAMConfig = nil, nil
		}
		id := nets[name].ID
		if own == mode || id != "" && id == mode || name == mode {
			if own != "bridge" {
				s.create.Networking = &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{own: ep}}
			}
			host.NetworkMode = container.NetworkMode(own)
			continue
		}
		s.others = append(s.others, join{own, ep})
	}
}
