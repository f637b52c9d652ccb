package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/config"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

// spec is a container described by flags.
type spec struct {
	config *container.Config
	host   *container.HostConfig
	net    *network.NetworkingConfig
	extra  api.CreateExtra
}

func parseInt(s string, p *int64) error {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return fmt.Errorf("%q is not a whole number", s)
	}
	*p = n
	return nil
}

// build makes the request of the flags; args are the image and the command.
func (a *App) build(o *createFlags, args []string) (*spec, error) {
	s, err := a.buildSpec(o, args)
	if err != nil {
		return nil, exitWith(exitEngine, err)
	}
	return s, nil
}

func (a *App) buildSpec(o *createFlags, args []string) (*spec, error) {
	s := &spec{}
	var err error
	if s.config, err = a.buildConfig(o, args); err != nil {
		return nil, err
	}
	if s.host, err = a.buildHost(o, s.config); err != nil {
		return nil, err
	}
	if s.net, err = o.buildNetworks(s.host); err != nil {
		return nil, err
	}
	s.extra = api.CreateExtra{RestartUnhealthy: o.restartUnhealthy, PublishThrough: o.publishThrough, Secrets: o.secrets}
	return s, nil
}

func (a *App) buildConfig(o *createFlags, args []string) (*container.Config, error) {
	c := &container.Config{Image: args[0], Cmd: args[1:], Hostname: o.hostname, Domainname: o.domainname, User: o.user,
		WorkingDir: o.workdir, Tty: o.tty, OpenStdin: o.stdin, StopSignal: o.stopSignal, StopTimeout: o.stopTimeout}
	if len(args) == 1 {
		c.Cmd = nil
	}
	if o.entrypointSet {
		c.Entrypoint = []string{o.entrypoint} // [""] asks for none
	}
	var err error
	if c.Env, err = notation.Env(o.env, o.envFiles, a.LookupEnv); err != nil {
		return nil, err
	}
	if c.Labels, err = notation.Labels(o.labels, o.labelFile); err != nil {
		return nil, err
	}
	if c.Healthcheck, err = o.healthcheck(); err != nil {
		return nil, err
	}
	return c, nil
}

func (o *createFlags) healthcheck() (*container.HealthConfig, error) {
	h := o.health
	set := h != (healthFlags{})
	if o.noHealthcheck {
		if set {
			return nil, errors.New("--no-healthcheck excludes the --health-* options")
		}
		return &container.HealthConfig{Test: []string{"NONE"}}, nil
	}
	if !set {
		return nil, nil
	}
	if h.interval < 0 || h.timeout < 0 || h.startPeriod < 0 || h.startInterval < 0 || h.retries < 0 {
		return nil, errors.New("a --health-* option is negative")
	}
	hc := &container.HealthConfig{Interval: h.interval, Timeout: h.timeout, StartPeriod: h.startPeriod, StartInterval: h.startInterval, Retries: h.retries}
	if h.cmd != "" {
		hc.Test = []string{"CMD-SHELL", h.cmd}
	}
	return hc, nil
}

func (a *App) buildHost(o *createFlags, c *container.Config) (*container.HostConfig, error) {
	h := &container.HostConfig{
		AutoRemove: o.autoRemove, CapAdd: o.capAdd, CapDrop: o.capDrop, GroupAdd: o.groupAdd, Privileged: o.privileged,
		ReadonlyRootfs: o.readOnly, PublishAllPorts: o.publishAll, VolumeDriver: o.volumeDriver, VolumesFrom: o.volumesFrom,
		DNSOptions: o.dnsOpts, DNSSearch: o.dnsSearch, Links: o.links, OomScoreAdj: o.oomScoreAdj, ShmSize: o.shmSize,
		IpcMode: container.IpcMode(o.ipc), PidMode: container.PidMode(o.pid), UTSMode: container.UTSMode(o.uts),
		UsernsMode: container.UsernsMode(o.userns), CgroupnsMode: container.CgroupnsMode(o.cgroupns),
		Isolation: container.Isolation(o.isolation), Runtime: o.runtime, Init: o.init, Resources: o.res,
		ContainerIDFile: o.cidfile,
	}
	h.CgroupParent, h.Ulimits, h.DeviceRequests = o.cgroupParent, o.ulimits, o.gpus
	if o.memorySwappinessSet {
		if o.memorySwappiness < -1 || o.memorySwappiness > 100 {
			return nil, errors.New("--memory-swappiness is from 0 to 100")
		}
		h.MemorySwappiness = &o.memorySwappiness
	}
	if o.oomKillDisable {
		h.OomKillDisable = &o.oomKillDisable
	}
	if o.oomScoreAdj < -1000 || o.oomScoreAdj > 1000 {
		return nil, errors.New("--oom-score-adj is from -1000 to 1000")
	}
	if o.autoRemove && o.restart != "" && o.restart != "no" {
		return nil, errors.New("--rm and --restart exclude each other")
	}
	var err error
	if o.restart != "" {
		if h.RestartPolicy, err = notation.Restart(o.restart); err != nil {
			return nil, err
		}
	}
	for _, m := range []struct {
		to   *map[string]string
		list []string
	}{{&h.LogConfig.Config, o.logOpts}, {&h.StorageOpt, o.storageOpts}, {&h.Sysctls, o.sysctls}, {&h.Annotations, o.annotations}} {
		if len(m.list) == 0 {
			continue
		}
		if *m.to, err = notation.Map(m.list); err != nil {
			return nil, err
		}
	}
	h.LogConfig.Type = o.logDriver
	if o.logDriver == "none" && len(o.logOpts) > 0 {
		return nil, errors.New("--log-driver none has no options")
	}
	for _, d := range o.dns {
		ip, err := netip.ParseAddr(d)
		if err != nil {
			return nil, fmt.Errorf("name server %q is not an address", d)
		}
		h.DNS = append(h.DNS, ip)
	}
	for _, x := range o.addHost {
		line, err := notation.Host(x)
		if err != nil {
			return nil, err
		}
		h.ExtraHosts = append(h.ExtraHosts, line)
	}
	if err := o.buildPorts(c, h); err != nil {
		return nil, err
	}
	if err := a.buildMounts(o, c, h); err != nil {
		return nil, err
	}
	if err := o.buildDevices(h); err != nil {
		return nil, err
	}
	return h, o.buildSecurity(h)
}

func (o *createFlags) buildPorts(c *container.Config, h *container.HostConfig) error {
	if len(o.ports) == 0 && len(o.expose) == 0 {
		return nil
	}
	var err error
	if c.ExposedPorts, h.PortBindings, err = notation.Ports(o.ports); err != nil {
		return err
	}
	for _, e := range o.expose {
		if err := notation.Expose(e, c.ExposedPorts); err != nil {
			return err
		}
	}
	return nil
}

func (a *App) buildMounts(o *createFlags, c *container.Config, h *container.HostConfig) error {
	home := config.Home(a.Getenv)
	for _, v := range o.volumes {
		bind, anon, err := notation.Volume(v, home)
		if err != nil {
			return err
		}
		if bind != "" {
			h.Binds = append(h.Binds, bind)
			continue
		}
		if c.Volumes == nil {
			c.Volumes = map[string]struct{}{}
		}
		c.Volumes[anon] = struct{}{}
	}
	for _, s := range o.mounts {
		m, bind, err := notation.Mount(s, home)
		if err != nil {
			return err
		}
		if bind != "" {
			h.Binds = append(h.Binds, bind)
			continue
		}
		h.Mounts = append(h.Mounts, m)
	}
	for _, t := range o.tmpfs {
		target, opts, err := notation.Tmpfs(t)
		if err != nil {
			return err
		}
		if h.Tmpfs == nil {
			h.Tmpfs = map[string]string{}
		}
		h.Tmpfs[target] = opts
	}
	if o.useAPISocket {
		x, err := a.context()
		if err != nil {
			return err
		}
		sock, ok := strings.CutPrefix(x.Host, "unix://")
		if !ok {
			return errors.New("--use-api-socket needs an engine at a unix socket")
		}
		h.Binds = append(h.Binds, sock+":/run/servin/servin.sock")
	}
	return nil
}

func (o *createFlags) buildDevices(h *container.HostConfig) error {
	var cdi []string
	for _, d := range o.devices {
		if notation.IsCDI(d) {
			cdi = append(cdi, d)
			continue
		}
		m, err := notation.Device(d)
		if err != nil {
			return err
		}
		h.Devices = append(h.Devices, m)
	}
	if len(cdi) > 0 {
		h.DeviceRequests = append(h.DeviceRequests, container.DeviceRequest{Driver: "cdi", DeviceIDs: cdi})
	}
	for _, r := range o.deviceRules {
		rule, err := notation.DeviceRule(r)
		if err != nil {
			return err
		}
		h.DeviceCgroupRules = append(h.DeviceCgroupRules, rule)
	}
	return nil
}

// maxProfile bounds a seccomp profile.
const maxProfile = 4 << 20

func (o *createFlags) buildSecurity(h *container.HostConfig) error {
	for _, s := range o.securityOpt {
		k, v, has := strings.Cut(s, "=")
		if !has {
			k, v, has = strings.Cut(s, ":") // the old form
		}
		switch {
		case k == "no-new-privileges", k == "disable" && !has:
		case !has:
			return fmt.Errorf("security option %q: write key=value", s)
		case k == "systempaths":
			if v != "unconfined" {
				return fmt.Errorf("security option %q: only systempaths=unconfined is known", s)
			}
			h.MaskedPaths, h.ReadonlyPaths = []string{}, []string{}
			continue
		case k == "seccomp" && v != "unconfined" && v != "builtin":
			b, err := os.ReadFile(v)
			if err != nil {
				return fmt.Errorf("cannot read the seccomp profile: %w", err)
			}
			if len(b) > maxProfile || !json.Valid(b) {
				return fmt.Errorf("the seccomp profile %s is not JSON", v)
			}
			s = "seccomp=" + string(b)
		case k == "apparmor", k == "seccomp", k == "label", k == "credentialspec", k == "writable-cgroups", k == "no-new-privileges":
		default:
			return fmt.Errorf("security option %q is unknown", k)
		}
		h.SecurityOpt = append(h.SecurityOpt, s)
	}
	return nil
}

func (o *createFlags) buildNetworks(h *container.HostConfig) (*network.NetworkingConfig, error) {
	if len(o.networks) == 0 {
		if len(o.aliases) == 0 && o.ip == "" && o.ip6 == "" && o.mac == "" && len(o.linkLocal) == 0 {
			return nil, nil
		}
	}
	list := make([]notation.Network, 0, len(o.networks)+1)
	for _, s := range o.networks {
		n, err := notation.ReadNetwork(s)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	if len(list) == 0 {
		list = append(list, notation.Network{Name: "default"})
	}
	h.NetworkMode = container.NetworkMode(list[0].Name)
	n := &list[0]
	n.Settings.Aliases = append(n.Settings.Aliases, o.aliases...)
	n.Settings.Links = o.links
	if len(list) == 1 && list[0].Settings.Links != nil && !userDefined(list[0].Name) {
		n.Settings.Links = nil // HostConfig.Links carries them
	}
	for _, set := range []struct {
		value string
		fn    func(string) error
		name  string
	}{{o.ip, n.SetIP, "--ip"}, {o.ip6, n.SetIP6, "--ip6"}, {o.mac, n.SetMAC, "--mac-address"}} {
		if set.value == "" {
			continue
		}
		if err := set.fn(set.value); err != nil {
			return nil, fmt.Errorf("cannot use %s: %w", set.name, err)
		}
	}
	for _, l := range o.linkLocal {
		if err := n.AddLinkLocal(l); err != nil {
			return nil, fmt.Errorf("cannot use --link-local-ip: %w", err)
		}
	}
	nc := &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{}}
	for i := range list {
		x := &list[i]
		joined := strings.HasPrefix(x.Name, "container:")
		if len(list) > 1 && (x.Name == "host" || x.Name == "none" || joined) {
			return nil, fmt.Errorf("network %s excludes other networks", x.Name)
		}
		if joined && (len(o.ports) > 0 || o.hostname != "") {
			return nil, fmt.Errorf("--publish and --hostname do not go with --network %s: set them on that container", x.Name)
		}
		if joined {
			continue
		}
		if _, twice := nc.EndpointsConfig[x.Name]; twice {
			return nil, fmt.Errorf("network %s is given twice", x.Name)
		}
		nc.EndpointsConfig[x.Name] = &x.Settings
	}
	if len(list) == 1 && bare(&list[0].Settings) {
		return nil, nil
	}
	return nc, nil
}

// bare reports whether nothing is asked of an endpoint.
func bare(e *network.EndpointSettings) bool {
	return e.IPAMConfig == nil && len(e.Links) == 0 && len(e.Aliases) == 0 && len(e.DriverOpts) == 0 && e.GwPriority == 0 && len(e.MacAddress) == 0
}

// userDefined reports whether a network is none of those that every engine has.
func userDefined(name string) bool {
	switch name {
	case "", "default", "bridge", "host", "none":
		return false
	}
	return !strings.HasPrefix(name, "container:")
}
