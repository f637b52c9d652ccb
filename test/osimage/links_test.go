package osimage

import (
	"bufio"
	"encoding/base64"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/vmwire"
	"github.com/cloudos-io/cloudos/test/harness"
)

// TestLinks starts machines with four cards: one with fixed addresses, routes and an MTU, two that are
// a bond with DHCP and a VLAN on it, and one with DHCP. The document is on the command line, or comes over the
// network: then all cards have had addresses by DHCP before, of which nothing is to be left. Cards
// that are pulled out and put in again are set up again.
func TestLinks(t *testing.T) {
	long(t)
	const document = `version: 1
network:
  links:
  - mac: "52:54:00:12:34:56" # QEMU's first card
    addresses: [10.0.2.77/24, "fd00:77::7/64"]
    gateway: 10.0.2.2
    routes: [{to: 198.51.100.0/24, via: 10.0.2.9}]
    mtu: 1400
  - name: bond0
    bond: {members: [eth1, eth2]}
  - name: office
    vlan: {parent: bond0, id: 12}
    addresses: [192.0.2.7/24]
  - name: eth3
  dns: [192.0.2.53]
  search: [example.net]
`
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, document) })}
	go server.Serve(l)
	defer server.Close()
	for name, config := range map[string]string{
		"command line": "base64:" + base64.StdEncoding.EncodeToString([]byte(document)),
		"network":      fmt.Sprintf("http://10.0.2.2:%d/", l.Addr().(*net.TCPAddr).Port),
	} {
		t.Run(name, func(t *testing.T) {
			qmp := filepath.Join(t.TempDir(), "q")
			m := vm(t, vmImage(t), "", "cloudos.config="+config, "-qmp", "unix:"+qmp+",server=on,wait=off",
				"-netdev", "user,id=u,net=10.0.7.0/24", "-netdev", "hubport,id=h0,hubid=1,netdev=u",
				"-netdev", "hubport,id=h1,hubid=1", "-device", "virtio-net-pci,netdev=h1,mac=52:54:00:00:00:02",
				"-netdev", "hubport,id=h2,hubid=1", "-device", "virtio-net-pci,netdev=h2,mac=52:54:00:00:00:03,id=eth2",
				"-netdev", "user,id=u3,net=10.0.8.0/24", "-device", "virtio-net-pci,netdev=u3,mac=52:54:00:00:00:04,id=eth3")
			if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 {
				t.Fatalf("the machine is %+v", s)
			}
			addresses := func(link string) []string {
				for _, i := range m.settled().Interfaces {
					if i.Name == link {
						return slices.DeleteFunc(i.Addresses, func(a string) bool { return strings.HasPrefix(a, "fe80:") || strings.HasPrefix(a, "fec0:") })
					}
				}
				return nil
			}
			for link, want := range map[string][]string{"eth0": {"10.0.2.77/24", "fd00:77::7/64"}, "bond0": {"10.0.7."}, "office": {"192.0.2.7/24"}, "eth3": {"10.0.8.15/24"}} {
				var got []string
				harness.Eventually(t, "addresses of "+link, 30*time.Second, func() bool { got = addresses(link); return len(got) >= len(want) })
				if !slices.EqualFunc(got, want, strings.HasPrefix) {
					t.Errorf("%s has %v, want %v", link, got, want)
				}
			}
			read := func(p string) string { return m.must("run", "--rm", "--network", "host", "servin/hello", "cat", p) }
			if out := read("/proc/net/bonding/bond0"); !strings.Contains(out, "active-backup") || !strings.Contains(out, "Interface: eth1") || !strings.Contains(out, "Interface: eth2") {
				t.Errorf("the bond is\n%s", out)
			}
			if out := read("/proc/net/vlan/office"); !strings.Contains(out, "VID: 12") || !strings.Contains(out, "Device: bond0") {
				t.Errorf("the VLAN is\n%s", out)
			}
			// As the kernel has them: bytes from the back.
			if out := read("/proc/net/route"); !strings.Contains(out, "eth0\t006433C6\t0902000A") || !strings.Contains(out, "eth0\t00000000\t0202000A") || strings.Contains(out, "eth1") || strings.Contains(out, "eth2") {
				t.Errorf("the routes are\n%s", out)
			}
			if out := read("/sys/class/net/eth0/mtu"); strings.TrimSpace(out) != "1400" {
				t.Errorf("the MTU is %s", out)
			}
			if out := read("/etc/resolv.conf"); !strings.HasPrefix(out, "nameserver 192.0.2.53\n") || !strings.Contains(out, "example.net") {
				t.Errorf("the name servers are\n%s", out)
			}
			for source, want := range map[string]string{"init": "bond0 has 10.0.7.", "kernel": "bond0: ", "engine": `"msg"`} {
				if out, err := m.cloudos("logs", "-n", "10000", "--source", source); err != nil || !strings.Contains(out, want) {
					t.Errorf("the log of %s has no %q: %v", source, want, err)
				}
			}
			if out, err := m.cloudos("logs", "--source", "nobody"); err == nil || !strings.Contains(out, "there is no log of") {
				t.Errorf("the log of nobody: %v, %s", err, out)
			}
			if out, err := m.cloudos("config"); err != nil || !strings.Contains(out, "In use, from: cmdline") || !strings.Contains(out, "QEMU's first card") {
				t.Errorf("the configuration is %q, %v", out, err)
			}
			kept := filepath.Join(t.TempDir(), "config.yaml")
			if err := os.WriteFile(kept, []byte("version: 1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			if out, err := m.cloudos("config", "set", kept); err == nil || !strings.Contains(out, "this machine has no data disk") {
				t.Errorf("a configuration where nothing is kept: %v, %s", err, out)
			}
			replug(t, qmp, "eth2", "virtio-net-pci", `"netdev": "h2", "mac": "52:54:00:00:00:03"`)
			replug(t, qmp, "eth3", "virtio-net-pci", `"netdev": "u3", "mac": "52:54:00:00:00:04"`)
			harness.Eventually(t, "the card that came back", 30*time.Second, func() bool { return strings.Contains(read("/proc/net/route"), "eth3\t0008000A") })
			harness.Eventually(t, "the bond's member that came back", 30*time.Second, func() bool { return strings.Contains(read("/proc/net/bonding/bond0"), "Interface: eth2") })
			m.off()
		})
	}
}

// TestLinksIPv6 finds the document of a machine whose network has router advertisements and no DHCP.
func TestLinksIPv6(t *testing.T) {
	long(t)
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("SKIP: this host has no IPv6: %v", err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "version: 1\nhostname: six\n") })}
	go server.Serve(l)
	defer server.Close()
	m := vm(t, vmImage(t), "", fmt.Sprintf("cloudos.config=http://[fec0::2]:%d/", l.Addr().(*net.TCPAddr).Port), "-set", "netdev.n.ipv4=off")
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Hostname != "six" {
		t.Fatalf("the machine is %+v", s)
	}
	m.off()
}

// replug pulls a device out of a running machine and puts one in again.
func replug(t *testing.T, qmp, id, driver, how string) {
	t.Helper()
	c, err := net.Dial("unix", qmp)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	lines := bufio.NewScanner(c)
	await := func(what string) {
		t.Helper()
		for lines.Scan() {
			if strings.Contains(lines.Text(), what) {
				return
			}
			if strings.Contains(lines.Text(), `"error"`) {
				t.Fatal(lines.Text())
			}
		}
		t.Fatalf("QEMU did not say %s: %v", what, lines.Err())
	}
	await("QMP")
	fmt.Fprintln(c, `{"execute": "qmp_capabilities"}`)
	await("return")
	fmt.Fprintf(c, `{"execute": "device_del", "arguments": {"id": %q}}`+"\n", id)
	await(fmt.Sprintf(`"device": %q`, id)) // an event of its virtio half comes before
	fmt.Fprintf(c, `{"execute": "device_add", "arguments": {"driver": %q, "id": %q, %s}}`+"\n", driver, id, how)
	await("return")
}
