// Package network keeps networks, endpoints, addresses, names and published
// ports. Manager (manager.go) owns the records and drives the backends:
// network/bridge makes links, network/nft keeps the one nftables table of an
// engine, network/ipam hands out addresses, network/dns answers names. The
// engine imports this package; its vocabulary is the Docker API's types.
package network

import (
	"net/netip"
	"os"

	"github.com/moby/moby/api/types/network"
)

// AttachRequest connects a container to a network.
type AttachRequest struct {
	ContainerID   string
	ContainerName string
	Hostname      string
	// Network is a name or id. Settings are what the user asked for (addresses,
	// aliases, MAC, driver options, gateway priority); may be nil.
	Network  string
	Settings *network.EndpointSettings
	// NetNS is the container's network namespace; nil reserves addresses only.
	NetNS *os.File
	// Link is a link prepared in that namespace by PrepareLink, or nil.
	Link *Link
	// IfName is the interface's name inside, "" for the next free ethN.
	IfName string
	// Ports to publish, from HostConfig.PortBindings (PublishAll already
	// expanded). Given with the attachment that carries them.
	Ports network.PortMap
	// DNS are the servers the container asked for (--dns): the embedded server
	// forwards to them instead of the host's.
	DNS []netip.Addr
	// PublishThrough lets published ports bypass the host's input rules.
	PublishThrough bool
	// Ephemeral: the record need not survive a power cut.
	Ephemeral bool
}

// Attachment is the result of an AttachRequest.
type Attachment struct {
	// Settings are complete: ids, addresses, gateways, MAC, DNS names.
	Settings network.EndpointSettings
	// Ports as published, host ports filled in.
	Ports network.PortMap
	// DNS servers the container's resolv.conf must name; empty leaves the
	// host's (user-defined networks: the embedded server, 127.0.0.11).
	DNS []string
	// Warnings to show the user.
	Warnings []string
}

// Link is a veth pair whose inner end is in a parked sandbox's namespace and
// whose outer end is on no bridge yet.
type Link struct {
	Outer string
	Index int
	// NetNS is open while the link is parked.
	NetNS *os.File
}

// Live describes a running container to Manager.Restore.
type Live struct {
	ContainerID string
	NetNS       *os.File
}

// Finding is something doctor should say about the host's network.
type Finding struct {
	Severity string // "info", "warning", "error"
	Title    string
	Detail   string
	Fix      string
	// Action is what AllowForward would do about it, "" if nothing.
	Action string
}
