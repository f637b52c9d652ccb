package dockerapi

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// createBody is the body of a create request with the fields that newer
// versions of the API dropped.
type createBody struct {
	container.CreateRequest
	MacAddress network.HardwareAddr // of the main network; up to 1.51
}

type created struct {
	CreateRequest
	warnings []string
}

var namePattern = pattern.New(`^/?[a-zA-Z0-9][a-zA-Z0-9_.-]+$`)

// containerName checks a name to be given; "" stays "".
func containerName(name string) (string, error) {
	if name != "" && (len(name) > 256 || !namePattern.MatchString(name)) {
		return "", fault.New(fault.Invalid, "Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, at most 255 characters", name)
	}
	return strings.TrimPrefix(name, "/"), nil
}

// decodeCreate reads POST /containers/create and translates what the version
// asked for says into what the engine knows.
func decodeCreate(w *response, r *request) (*created, error) {
	name, err := containerName(r.query.Get("name"))
	if err != nil {
		return nil, err
	}
	raw, err := r.body(w)
	if err != nil {
		return nil, err
	}
	var body createBody
	if len(raw) > 0 {
		if err := decodeJSON(raw, &body); err != nil {
			return nil, err
		}
	}
	if len(raw) == 0 {
		return nil, fault.New(fault.Invalid, "invalid JSON: EOF")
	}
	if body.Config == nil {
		return nil, fault.New(fault.Invalid, "config cannot be empty in order to create a container")
	}
	c := &created{CreateRequest: CreateRequest{
		Name: name, APIVersion: r.version.String(),
		Config: body.Config, HostConfig: body.HostConfig, Networking: body.NetworkingConfig,
	}}
	if r.version >= 41 {
		if c.Platform, err = parsePlatform(r.query.Get("platform")); err != nil {
			return nil, err
		}
	}
	if r.version == 40 {
		if err := refuseCapabilities(raw); err != nil {
			return nil, err
		}
	}
	if err := c.complete(); err != nil {
		return nil, err
	}
	if err := c.adapt(r.version); err != nil {
		return nil, err
	}
	if r.version < 52 {
		if err := c.mainMAC(r.version, body.MacAddress); err != nil {
			return nil, err
		}
	}
	if err := c.interfaceSysctls(r.version); err != nil {
		return nil, err
	}
	c.emptyBindings(r.version)
	return c, nil
}

// complete fills what may be missing and checks what no version may hold.
func (c *created) complete() error {
	if c.HostConfig == nil {
		c.HostConfig = &container.HostConfig{}
	}
	if c.Networking == nil {
		c.Networking = &network.NetworkingConfig{}
	}
	hc, eps := c.HostConfig, c.Networking.EndpointsConfig
	if eps == nil {
		eps = map[string]*network.EndpointSettings{}
		c.Networking.EndpointsConfig = eps
	}
	for k, ep := range eps {
		if ep == nil {
			eps[k] = &network.EndpointSettings{}
		}
	}
	if hc.NetworkMode == "" || hc.NetworkMode.IsDefault() {
		hc.NetworkMode = network.NetworkBridge
		if ep, ok := eps[network.NetworkDefault]; ok {
			delete(eps, network.NetworkDefault)
			eps[network.NetworkBridge] = ep
		}
	}
	if hc.PidsLimit != nil && *hc.PidsLimit <= 0 {
		hc.PidsLimit = nil
	}
	if hc.UsernsMode == "auto" {
		c.Extra.UsernsAuto = true
	}
	var err error
	if c.Extra.RestartUnhealthy, err = boolLabel(c.Config.Labels, api.LabelRestartUnhealthy); err != nil {
		return err
	}
	if c.Extra.PublishThrough, err = boolLabel(c.Config.Labels, api.LabelPublishThrough); err != nil {
		return err
	}
	if err := c.secretLabels(); err != nil {
		return err
	}
	for _, m := range hc.Mounts {
		if m.Type == "" {
			return fault.New(fault.Invalid, "invalid mount config: the mount type is missing")
		}
	}
	if s := hc.ConsoleSize; s[0] > 65535 || s[1] > 65535 {
		return fault.New(fault.Invalid, "invalid ConsoleSize: at most 65535 by 65535")
	}
	return nil
}

func boolLabel(labels map[string]string, key string) (bool, error) {
	v, ok := labels[key]
	if !ok {
		return false, nil
	}
	b, err := strconv.ParseBool(v)
	if err != nil {
		return false, fault.New(fault.Invalid, "invalid label %s=%q: must be true or false", key, v)
	}
	return b, nil
}

// adapt undoes and defaults what came with versions newer than v.
func (c *created) adapt(v version) error {
	hc := c.HostConfig
	if v < 40 && hc.IpcMode.IsEmpty() {
		hc.IpcMode = container.IPCModeShareable
	}
	if v < 42 {
		hc.ConsoleSize = [2]uint{}
	}
	if v < 43 {
		hc.Annotations = nil
	}
	if v < 44 {
		if c.Config.Healthcheck != nil {
			c.Config.Healthcheck.StartInterval = 0
		}
		if len(c.Networking.EndpointsConfig) > 1 {
			return fault.New(fault.Invalid, "Container cannot be created with multiple network endpoints: %s",
				strings.Join(slices.Sorted(maps.Keys(c.Networking.EndpointsConfig)), ", "))
		}
	}
	if v < 48 {
		for _, ep := range c.Networking.EndpointsConfig {
			ep.GwPriority = 0
		}
	}
	if v < 56 {
		hc.Umask = nil
	}
	for i := range hc.Mounts {
		if err := adaptMount(&hc.Mounts[i], v); err != nil {
			return err
		}
	}
	if v >= 48 && hc.VolumeDriver != "" {
		for _, m := range hc.Mounts {
			if m.Type == mount.TypeVolume && (m.VolumeOptions == nil || m.VolumeOptions.DriverConfig == nil || m.VolumeOptions.DriverConfig.Name == "") {
				c.warn("WARNING: the container-wide volume-driver configuration is ignored for volumes specified via 'mount'. Use '--mount type=volume,volume-driver=...' instead")
				break
			}
		}
	}
	return nil
}

func (c *created) warn(s string) { c.warnings = append(c.warnings, s) }

func adaptMount(m *mount.Mount, v version) error {
	if bo := m.BindOptions; bo != nil {
		if v < 40 {
			bo.NonRecursive = false
		}
		if v < 42 {
			bo.CreateMountpoint = false
		}
		if v < 44 && bo.ReadOnlyForceRecursive {
			return fault.New(fault.Invalid, "BindOptions.ReadOnlyForceRecursive needs API v1.44 or newer")
		}
	}
	if v < 44 && m.Type == mount.TypeBind && m.ReadOnly {
		// Read-only mounts were not recursive then.
		if m.BindOptions == nil {
			m.BindOptions = &mount.BindOptions{}
		}
		m.BindOptions.ReadOnlyNonRecursive = true
	}
	if v < 45 && m.VolumeOptions != nil && m.VolumeOptions.Subpath != "" {
		return fault.New(fault.Invalid, "VolumeOptions.Subpath needs API v1.45 or newer")
	}
	if v < 48 && m.Type == mount.TypeImage {
		return fault.New(fault.Invalid, `Mount type "Image" needs API v1.48 or newer`)
	}
	foreign := func(what string) error {
		return fault.New(fault.Invalid, "%s must not be specified on mount type %q", what, m.Type)
	}
	if m.VolumeOptions != nil && m.Type != mount.TypeVolume {
		if v >= 42 {
			return foreign("VolumeOptions")
		}
		m.VolumeOptions = nil
	}
	if m.TmpfsOptions != nil && m.Type != mount.TypeTmpfs {
		if v >= 42 {
			return foreign("TmpfsOptions")
		}
		m.TmpfsOptions = nil
	}
	if m.BindOptions != nil && m.Type != mount.TypeBind && v >= 42 {
		return foreign("BindOptions")
	}
	return nil
}

// refuseCapabilities looks for a field that 1.40 alone had. Ignoring it would
// run the container with other privileges than asked for.
func refuseCapabilities(raw []byte) error {
	if !bytes.Contains(raw, []byte("apabilities")) {
		return nil
	}
	var legacy struct {
		HostConfig struct{ Capabilities []string }
	}
	if err := decodeJSON(raw, &legacy); err != nil {
		return err
	}
	if len(legacy.HostConfig.Capabilities) > 0 {
		return fault.New(fault.Invalid, "the HostConfig.Capabilities field is not supported by this daemon; use CapAdd and CapDrop to set capabilities")
	}
	return nil
}

// mainMAC moves the container-wide MAC address of older clients to the endpoint
// of the container's main network.
func (c *created) mainMAC(v version, mac network.HardwareAddr) error {
	eps := c.Networking.EndpointsConfig
	mode := c.HostConfig.NetworkMode
	if len(mac) == 0 {
		if v < 44 {
			for _, ep := range eps {
				ep.MacAddress = nil
			}
		}
		return nil
	}
	if !mode.IsBridge() && !mode.IsUserDefined() {
		if v < 44 {
			return fault.New(fault.Invalid, "conflicting options: mac-address and the network mode")
		}
		return nil
	}
	ep, err := c.mainEndpoint(v)
	if err != nil {
		return err
	}
	if v >= 44 {
		if len(ep.MacAddress) > 0 && !bytes.Equal(ep.MacAddress, mac) {
			return fault.New(fault.Invalid, "the container-wide MAC address must match the endpoint-specific MAC address for the main network, or be left empty")
		}
		c.warn("The container-wide MacAddress field is now deprecated. It should be specified in EndpointsConfig instead.")
	}
	ep.MacAddress = mac
	return nil
}

// mainEndpoint finds or makes the settings of the network that NetworkMode names.
func (c *created) mainEndpoint(v version) (*network.EndpointSettings, error) {
	eps, name := c.Networking.EndpointsConfig, c.HostConfig.NetworkMode.NetworkName()
	if ep, ok := eps[name]; ok {
		return ep, nil
	}
	if len(eps) == 0 {
		ep := &network.EndpointSettings{}
		eps[name] = ep
		return ep, nil
	}
	if v < 44 { // then there is exactly one
		for _, ep := range eps {
			return ep, nil
		}
	}
	return nil, fault.New(fault.Invalid, "HostConfig.NetworkMode must match the identity of a network in NetworkSettings.Networks")
}

// optSysctls is the driver option that holds an endpoint's sysctls.
const optSysctls = "com.docker.network.endpoint.sysctls"

// interfaceSysctls moves sysctls that name an interface to the endpoint: they
// can be set only once the interface is there.
func (c *created) interfaceSysctls(v version) error {
	hc := c.HostConfig
	if !hc.NetworkMode.IsPrivate() {
		return nil
	}
	var moved, opts []string
	for _, k := range slices.Sorted(maps.Keys(hc.Sysctls)) {
		part := strings.SplitN(k, ".", 5)
		if len(part) != 5 || part[0] != "net" || !strings.HasPrefix(part[3], "eth") {
			continue
		}
		if v >= 48 {
			return fault.New(fault.Invalid, "interface specific sysctl setting %q must be supplied using driver option '%s'", k, optSysctls)
		}
		if part[3] != "eth0" {
			return fault.New(fault.Invalid, "unable to determine network endpoint for sysctl %s, use driver option '%s' to set per-interface sysctls", k, optSysctls)
		}
		moved = append(moved, k)
		opts = append(opts, fmt.Sprintf("net.%s.%s.IFNAME.%s=%s", part[1], part[2], part[4], hc.Sysctls[k]))
	}
	if moved == nil {
		return nil
	}
	ep, err := c.mainEndpoint(v)
	if err != nil {
		return err
	}
	opt := strings.Join(opts, ",")
	c.warn(fmt.Sprintf("Migrated sysctl %q to DriverOpts{%q:%q}.", strings.Join(moved, ","), optSysctls, opt))
	if old := ep.DriverOpts[optSysctls]; old != "" {
		opt += "," + old
	}
	if ep.DriverOpts == nil {
		ep.DriverOpts = map[string]string{}
	}
	ep.DriverOpts[optSysctls] = opt
	for _, k := range moved {
		delete(hc.Sysctls, k)
	}
	return nil
}

// emptyBindings gives ports with an empty list of bindings one without address
// and port: "publish it anywhere".
func (c *created) emptyBindings(v version) {
	var empty []string
	for p, b := range c.HostConfig.PortBindings {
		if len(b) == 0 {
			c.HostConfig.PortBindings[p] = []network.PortBinding{{}}
			empty = append(empty, p.String())
		}
	}
	if v >= 52 && len(empty) > 0 {
		slices.Sort(empty)
		c.warn("Following container port(s) have an empty list of port-bindings: " + strings.Join(empty, ", ") + ". Such bindings will be discarded in a future version.")
	}
}
