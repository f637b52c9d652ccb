package dockerapi

import (
	"maps"
	"net/netip"
	"net/url"
	"slices"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"
)

// This file gives answers about containers and events the fields that the
// version asked for had. Fields are added by embedding: an outer field hides
// the embedded one of the same name.

func shapeSummaries(l []container.Summary, v version) {
	if v >= 52 {
		return
	}
	for i := range l {
		l[i].Health = nil
		if v < 48 {
			l[i].ImageManifestDescriptor = nil
		}
		if v < 46 {
			l[i].HostConfig.Annotations = nil
		}
	}
}

// legacyInspect is a container up to 1.51.
type legacyInspect struct {
	*container.InspectResponse
	Config          *legacyConfig
	NetworkSettings *legacyNetworkSettings
}

type legacyConfig struct {
	*container.Config
	OnBuild []string
}

// legacyNetworkSettings repeat the default bridge's endpoint at the top.
type legacyNetworkSettings struct {
	Bridge                 string
	SandboxID              string
	SandboxKey             string
	Ports                  network.PortMap
	HairpinMode            bool
	LinkLocalIPv6Address   string
	LinkLocalIPv6PrefixLen int
	SecondaryIPAddresses   []string
	SecondaryIPv6Addresses []string
	EndpointID             string
	Gateway                netip.Addr
	GlobalIPv6Address      netip.Addr
	GlobalIPv6PrefixLen    int
	IPAddress              netip.Addr
	IPPrefixLen            int
	IPv6Gateway            netip.Addr
	MacAddress             network.HardwareAddr
	Networks               map[string]*network.EndpointSettings
}

// shapeInspect may change c.
func shapeInspect(c *container.InspectResponse, v version) any {
	if c.Config == nil {
		c.Config = &container.Config{}
	}
	if v < 56 && c.HostConfig != nil && c.HostConfig.Umask != nil {
		hc := *c.HostConfig
		hc.Umask = nil
		c.HostConfig = &hc
	}
	if v >= 52 {
		return c
	}
	if v < 48 {
		c.ImageManifestDescriptor = nil
	}
	if c.GraphDriver == nil && c.Storage != nil && c.Storage.RootFS != nil && c.Storage.RootFS.Snapshot != nil {
		c.GraphDriver = &storage.DriverData{Name: c.Storage.RootFS.Snapshot.Name}
		c.Storage = nil
	}
	ns := &legacyNetworkSettings{}
	if n := c.NetworkSettings; n != nil {
		ns.SandboxID, ns.SandboxKey, ns.Ports, ns.Networks = n.SandboxID, n.SandboxKey, n.Ports, n.Networks
		if v < 45 {
			ns.Networks = shortIDAliases(n.Networks, c)
		}
		if b := n.Networks[network.NetworkBridge]; b != nil {
			ns.EndpointID, ns.Gateway, ns.MacAddress = b.EndpointID, b.Gateway, b.MacAddress
			ns.GlobalIPv6Address, ns.GlobalIPv6PrefixLen = b.GlobalIPv6Address, b.GlobalIPv6PrefixLen
			ns.IPAddress, ns.IPPrefixLen, ns.IPv6Gateway = b.IPAddress, b.IPPrefixLen, b.IPv6Gateway
		}
	}
	return legacyInspect{
		InspectResponse: c,
		Config:          &legacyConfig{Config: c.Config, OnBuild: c.Config.OnBuild},
		NetworkSettings: ns,
	}
}

// shortIDAliases adds the short id and the host name to the aliases on
// user-defined networks, as was usual up to 1.44. The engine's maps may be
// shared, so they are copied.
func shortIDAliases(m map[string]*network.EndpointSettings, c *container.InspectResponse) map[string]*network.EndpointSettings {
	m = maps.Clone(m)
	for name, ep := range m {
		if ep == nil || !container.NetworkMode(name).IsUserDefined() {
			continue
		}
		e := *ep
		e.Aliases = slices.Clone(e.Aliases)
		for _, a := range []string{c.ID[:min(12, len(c.ID))], c.Config.Hostname} {
			if a != "" && !slices.Contains(e.Aliases, a) {
				e.Aliases = append(e.Aliases, a)
			}
		}
		m[name] = &e
	}
	return m
}

// legacyEvent is an event up to 1.51: containers' and images' carry fields that
// 1.22 had already declared obsolete.
type legacyEvent struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func shapeEvent(m events.Message, v version) any {
	if v >= 52 {
		return m
	}
	e := legacyEvent{Message: m}
	switch m.Type {
	case events.ContainerEventType:
		e.Status, e.ID, e.From = string(m.Action), m.Actor.ID, m.Actor.Attributes["image"]
	case events.ImageEventType:
		e.Status, e.ID = string(m.Action), m.Actor.ID
	}
	return e
}

// appendAttrs writes the details= of a log record, sorted and query-escaped.
func appendAttrs(b []byte, attrs map[string]string) []byte {
	for i, k := range slices.Sorted(maps.Keys(attrs)) {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, url.QueryEscape(k)...)
		b = append(b, '=')
		b = append(b, url.QueryEscape(attrs[k])...)
	}
	return b
}
