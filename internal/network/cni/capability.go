package cni

import (
	"encoding/json"
	"net"
	"net/netip"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Capabilities are what a runtime may tell plugins beyond their configuration
// (CNI's CONVENTIONS.md, "dynamic plugin specific fields"). A plugin is told only
// those that its configuration lists.
type Capabilities struct {
	PortMappings []PortMapping `json:"portMappings,omitempty"`
	Bandwidth    *Bandwidth    `json:"bandwidth,omitempty"`
	// IPRanges are sets of ranges; the container gets an address of each set.
	IPRanges [][]IPRange `json:"ipRanges,omitempty"`
	// IPs are the addresses wanted, with or without a prefix.
	IPs            []string `json:"ips,omitempty"`
	DNS            *DNS     `json:"dns,omitempty"`
	MAC            string   `json:"mac,omitempty"`
	Aliases        []string `json:"aliases,omitempty"`
	InfinibandGUID string   `json:"infinibandGUID,omitempty"`
	DeviceID       string   `json:"deviceID,omitempty"`
	CgroupPath     string   `json:"cgroupPath,omitempty"`
	// PodAnnotations are what containerd and CRI-O pass on under this name.
	PodAnnotations map[string]string `json:"io.kubernetes.cri.pod-annotations,omitempty"`
}

// PortMapping is a port of the container's published on the host.
type PortMapping struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// Bandwidth limits a container, in bits and bits per second; a rate of 0 is none.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate"`
	IngressBurst uint64 `json:"ingressBurst"`
	EgressRate   uint64 `json:"egressRate"`
	EgressBurst  uint64 `json:"egressBurst"`
}

// IPRange is a range of addresses.
type IPRange struct {
	Subnet     string `json:"subnet"`
	RangeStart string `json:"rangeStart,omitempty"`
	RangeEnd   string `json:"rangeEnd,omitempty"`
	Gateway    string `json:"gateway,omitempty"`
}

// DNS is the content of a resolv.conf.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// Names of the capabilities that others ask about.
const (
	PortMappings = "portMappings"
	IPs          = "ips"
	MAC          = "mac"
	Aliases      = "aliases"
)

func (c *Capabilities) check() error {
	for _, p := range c.PortMappings {
		switch p.Protocol {
		case "tcp", "udp", "sctp":
		default:
			return fault.New(fault.Invalid, "cannot publish port %d: the protocol is none of tcp, udp and sctp", p.ContainerPort)
		}
		if p.HostPort == 0 || p.ContainerPort == 0 {
			return fault.New(fault.Invalid, "cannot publish port %d at %d: ports are from 1 to 65535", p.ContainerPort, p.HostPort)
		}
		if p.HostIP != "" {
			if _, err := netip.ParseAddr(p.HostIP); err != nil {
				return fault.New(fault.Invalid, "cannot publish port %d at %q: that is no address", p.ContainerPort, p.HostIP)
			}
		}
	}
	for _, set := range c.IPRanges {
		for _, r := range set {
			if _, err := netip.ParsePrefix(r.Subnet); err != nil {
				return fault.New(fault.Invalid, "cannot use the address range %q: that is no subnet", r.Subnet)
			}
		}
	}
	for _, a := range c.IPs {
		if _, err := netip.ParseAddr(a); err != nil {
			if _, err := netip.ParsePrefix(a); err != nil {
				return fault.New(fault.Invalid, "cannot use the address %q: that is none", a)
			}
		}
	}
	if c.MAC != "" {
		if m, err := net.ParseMAC(c.MAC); err != nil || len(m) != 6 {
			return fault.New(fault.Invalid, "cannot use the MAC address %q: six bytes are wanted", c.MAC)
		}
	}
	if c.InfinibandGUID != "" {
		if g, err := net.ParseMAC(c.InfinibandGUID); err != nil || len(g) != 8 {
			return fault.New(fault.Invalid, "cannot use the InfiniBand GUID %q: eight bytes are wanted", c.InfinibandGUID)
		}
	}
	if strings.ContainsRune(c.CgroupPath, 0) {
		return fault.New(fault.Invalid, "cannot pass the cgroup %q on", c.CgroupPath)
	}
	return nil
}

// args are the capabilities that are set, by name.
func (c *Capabilities) args() (map[string]json.RawMessage, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	out := map[string]json.RawMessage{}
	err = json.Unmarshal(b, &out)
	return out, err
}
