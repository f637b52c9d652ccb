package engine

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	mcontainer "github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/oci"
)

// podFiles makes what a pod's containers share besides namespaces: /dev/shm and
// the files of the network. They belong to the pod's root.
func (e *Engine) podFiles(p *pod, r *container.Pod) error {
	owner := -1
	if r.UserNS.Size != 0 {
		owner = int(r.UserNS.Host)
	}
	shm := filepath.Join(p.dir, "shm")
	err := os.Mkdir(shm, 0o777)
	if err == nil {
		err = os.Chmod(shm, 0o777|os.ModeSticky)
	}
	if err == nil && owner >= 0 {
		err = os.Chown(shm, owner, owner)
	}
	write := func(name string, data []byte) {
		path := filepath.Join(p.dir, name)
		if err == nil {
			err = os.WriteFile(path, data, 0o644)
		}
		if err == nil && owner >= 0 {
			err = os.Chown(path, owner, owner)
		}
	}
	host := r.Hostname
	if host == "" {
		host, _ = os.Hostname()
	}
	write(hostnameFile, []byte(host+"\n"))
	hosts := []byte("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if r.Network == container.NamespaceHost {
		if b, rerr := os.ReadFile("/etc/hosts"); rerr == nil {
			hosts = b
		}
	}
	write(hostsFile, hosts)
	write(resolvFile, e.podResolv(r))
	if err != nil {
		return fmt.Errorf("cannot write the pod's files: %w", err)
	}
	return nil
}

// podNames writes what depends on the network.
func (e *Engine) podNames(p *pod, r *container.Pod) error {
	var b bytes.Buffer
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\nff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
	for _, ip := range r.IPs {
		if r.Hostname != "" {
			b.WriteString(ip.String() + "\t" + r.Hostname + "\n")
		}
	}
	err := put(filepath.Join(p.dir, hostsFile), b.Bytes())
	if err == nil {
		err = put(filepath.Join(p.dir, resolvFile), e.podResolv(r))
	}
	return err
}

// podResolv is the pod's resolv.conf: as asked for, or the host's. Kubernetes says
// all of it or nothing, so nothing is mixed.
func (e *Engine) podResolv(r *container.Pod) []byte {
	if len(r.DNS)+len(r.Search)+len(r.Options) == 0 {
		mode := mcontainer.NetworkMode("bridge")
		if r.Network == container.NamespaceHost {
			mode = "host"
		}
		return e.resolvConf(&container.Record{HostConfig: &mcontainer.HostConfig{NetworkMode: mode}}, nil)
	}
	var b bytes.Buffer
	for _, s := range r.DNS {
		b.WriteString("nameserver " + s + "\n")
	}
	if len(r.Search) > 0 {
		b.WriteString("search " + strings.Join(r.Search, " ") + "\n")
	}
	if len(r.Options) > 0 {
		b.WriteString("options " + strings.Join(r.Options, " ") + "\n")
	}
	return b.Bytes()
}

// podFilePaths are the generated files that a pod's containers see.
func podFilePaths(p *pod) oci.Files {
	return oci.Files{
		Hosts: filepath.Join(p.dir, hostsFile), Hostname: filepath.Join(p.dir, hostnameFile), ResolvConf: filepath.Join(p.dir, resolvFile),
	}
}

// PodDNSValid tells whether a line of a resolv.conf can hold the values.
func PodDNSValid(servers, search, options []string) bool {
	for _, s := range servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return false
		}
	}
	for _, l := range [][]string{search, options} {
		for _, s := range l {
			if s == "" || strings.ContainsAny(s, " \t\n\x00") {
				return false
			}
		}
	}
	return true
}
