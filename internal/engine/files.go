package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/oci"
	vol "github.com/cloudos-io/cloudos/internal/volume"
)

// names of the generated files in a unit's directory, as Docker has them.
const (
	hostsFile    = "hosts"
	hostnameFile = "hostname"
	resolvFile   = "resolv.conf"
)

// filePaths tells where a container's generated files lie; one that shares
// another's network shares its files.
func (e *Engine) filePaths(u *unit, r *container.Record) oci.Files {
	if r.Pod != nil {
		if p, _, err := e.podOf(r); err == nil {
			return podFilePaths(p)
		}
		return oci.Files{}
	}
	dir := u.dir
	if r.HostConfig.NetworkMode.IsContainer() {
		if o, err := e.lookup(r.HostConfig.NetworkMode.ConnectedContainer()); err == nil {
			dir = o.dir
		}
	}
	return oci.Files{
		Hosts: filepath.Join(dir, hostsFile), Hostname: filepath.Join(dir, hostnameFile), ResolvConf: filepath.Join(dir, resolvFile),
	}
}

// generated are a container's files, open while it is started: the mounts need
// them before the network says what is in them.
type generated struct{ hosts, resolv *os.File }

// openFiles makes the generated files as far as they are known. They belong to
// the container's root.
func (e *Engine) openFiles(ctx context.Context, u *unit, r *container.Record, label string, s *scope) (g generated, err error) {
	open := func(name string) *os.File {
		if err != nil {
			return nil
		}
		var f *os.File
		if f, err = os.OpenFile(filepath.Join(u.dir, name), os.O_WRONLY|os.O_CREATE, 0o644); err != nil {
			return nil
		}
		s.hold(f)
		if r.UserNS.Size != 0 {
			err = f.Chown(int(r.UserNS.Host), int(r.UserNS.Host))
		}
		if err == nil {
			err = vol.Relabel(ctx, f, label, false)
		}
		return f
	}
	g.hosts, g.resolv = open(hostsFile), open(resolvFile)
	if f := open(hostnameFile); err == nil {
		err = replace(f, []byte(r.Config.Hostname+"\n"))
	}
	if err != nil {
		return g, fmt.Errorf("cannot write the container's files: %w", err)
	}
	return g, nil
}

// replace writes a small file in place: a running container has it mounted, so
// it must stay the same inode.
func replace(f *os.File, b []byte) error {
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() > int64(len(b)) {
		if err := f.Truncate(0); err != nil {
			return err
		}
	}
	_, err = f.WriteAt(b, 0)
	return err
}

// put is replace by name.
func put(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(replace(f, b), f.Close())
}

// fill writes what depends on the endpoints in use.
func (e *Engine) fill(g generated, r *container.Record, a attached) error {
	err := replace(g.hosts, e.hosts(r, a.endpoints, e.linkHosts(r)))
	if err == nil {
		err = replace(g.resolv, e.resolvConf(r, a.dns))
	}
	if err != nil {
		return fmt.Errorf("cannot write the container's files: %w", err)
	}
	return nil
}

// servers are the DNS servers that a container asked for, or the engine's.
func (e *Engine) servers(r *container.Record) []netip.Addr {
	if len(r.HostConfig.DNS) > 0 {
		return r.HostConfig.DNS
	}
	return e.cfg.Resolver.Servers
}

// hostEntry is a line of a hosts file.
type hostEntry struct {
	ip    netip.Addr
	names string
}

// hosts generates /etc/hosts from the endpoints in use, links and --add-host.
func (e *Engine) hosts(r *container.Record, eps map[string]*network.EndpointSettings, links []hostEntry) []byte {
	if r.HostConfig.NetworkMode.IsHost() && len(r.HostConfig.ExtraHosts) == 0 {
		b, err := os.ReadFile("/etc/hosts")
		if err == nil {
			return b
		}
	}
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	line := func(ip netip.Addr, names string) {
		if ip.IsValid() && names != "" {
			b.WriteString(ip.String() + "\t" + names + "\n")
		}
	}
	for _, l := range links {
		line(l.ip, l.names)
	}
	gateway := hostGateway(eps)
	for _, x := range r.HostConfig.ExtraHosts {
		name, ip, ok := strings.Cut(x, ":")
		if n, i, eq := strings.Cut(x, "="); eq && (!ok || len(n) < len(name)) {
			name, ip = n, i
		}
		if ip == "host-gateway" {
			line(gateway, name)
		} else if a, err := netip.ParseAddr(strings.Trim(ip, "[]")); err == nil {
			line(a, name)
		}
	}
	own := r.Config.Hostname
	if first, _, dotted := strings.Cut(own, "."); dotted {
		own += " " + first
	}
	if d := r.Config.Domainname; d != "" {
		own = r.Config.Hostname + "." + d + " " + r.Config.Hostname
	}
	for _, name := range sortedEndpoints(r, eps) {
		ep := eps[name]
		line(ep.IPAddress, own)
		line(ep.GlobalIPv6Address, own)
	}
	return b.Bytes()
}

// hostGateway is the address under which a container reaches its host.
func hostGateway(eps map[string]*network.EndpointSettings) netip.Addr {
	if ep := eps[network.NetworkBridge]; ep != nil && ep.Gateway.IsValid() {
		return ep.Gateway
	}
	for _, ep := range eps {
		if ep.Gateway.IsValid() {
			return ep.Gateway
		}
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// resolvConf generates /etc/resolv.conf: the servers that the network says,
// else those asked for, else the host's without loopback ones, which a container
// cannot reach.
func (e *Engine) resolvConf(r *container.Record, servers []string) []byte {
	hc := r.HostConfig
	host, _ := os.ReadFile("/etc/resolv.conf")
	var hostServers, search, options []string
	for line := range strings.SplitSeq(string(host), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			a, err := netip.ParseAddr(f[1])
			if err == nil && (hc.NetworkMode.IsHost() || !a.Unmap().IsLoopback()) {
				hostServers = append(hostServers, f[1])
			}
		case "search", "domain":
			search = f[1:]
		case "options":
			options = append(options, f[1:]...)
		}
	}
	if l := e.cfg.Resolver.Search; len(l) > 0 {
		search = l
	}
	if l := e.cfg.Resolver.Options; len(l) > 0 {
		options = l
	}
	if len(hc.DNSSearch) > 0 {
		search = hc.DNSSearch
		if len(search) == 1 && search[0] == "." {
			search = nil
		}
	}
	if len(hc.DNSOptions) > 0 {
		options = hc.DNSOptions
	}
	if len(servers) == 0 {
		for _, a := range e.servers(r) {
			servers = append(servers, a.String())
		}
	}
	if len(servers) == 0 {
		servers = hostServers
	}
	if len(servers) == 0 && !hc.NetworkMode.IsHost() && !hc.NetworkMode.IsNone() {
		servers = []string{"8.8.8.8", "8.8.4.4"} // as every engine does for want of a reachable one
	}
	var b bytes.Buffer
	for _, s := range servers {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(search) > 0 {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return b.Bytes()
}

// refreshFiles writes the generated files of a running container anew after its
// networks changed. A resolv.conf that somebody edited is left alone.
func (e *Engine) refreshFiles(u *unit, before, now *container.Record) {
	if err := put(filepath.Join(u.dir, hostsFile), e.hosts(now, now.Attached, e.linkHosts(now))); err != nil {
		e.log.Warn("cannot write a container's hosts file", "container", u.id, "cause", err)
	}
	path := filepath.Join(u.dir, resolvFile)
	want := e.resolvConf(now, now.DNS)
	have, err := os.ReadFile(path)
	if err != nil || bytes.Equal(have, want) || !bytes.Equal(have, e.resolvConf(before, before.DNS)) {
		return
	}
	if err := put(path, want); err != nil {
		e.log.Warn("cannot write a container's resolv.conf", "container", u.id, "cause", err)
	}
}
