package native

import (
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

func TestSeveralNetworksOfAContainer(t *testing.T) {
	e := start(t)
	e.must("networks", "create", "--subnet", "10.61.0.0/24", "front")
	e.must("networks", "create", "--subnet", "10.62.0.0/24", "-o", "com.servin.network.bandwidth=100mbit", "back")
	e.must("networks", "create", "--internal", "--subnet", "10.63.0.0/24", "-o", "com.servin.network.vip=true", "store")
	e.must("run", "-d", "--name", "app",
		"--network", "name=front,ip=10.61.0.9,mac-address=02:00:00:00:00:09,driver-opt=com.docker.network.endpoint.ifname=pub0",
		"--network", "name=back,gw-priority=10,driver-opt=com.docker.network.endpoint.ifname=priv0,alias=api",
		"--network", "store", "bb", "httpd", "-f", "-p", "80", "-h", "/etc")
	addr := e.must("exec", "app", "ip", "-o", "-4", "addr")
	for _, want := range []string{"pub0    inet 10.61.0.9/24", "priv0    inet 10.62.0.2/24", "inet 10.63.0.2/24"} {
		if !strings.Contains(addr, want) {
			t.Errorf("no %q in\n%s", want, addr)
		}
	}
	if r := e.must("exec", "app", "ip", "route"); !strings.Contains(r, "default via 10.62.0.1 dev priv0") || strings.Count(r, "default") != 1 {
		t.Errorf("routes:\n%s", r)
	}
	if l := e.must("exec", "app", "ip", "link", "show", "pub0"); !strings.Contains(l, "02:00:00:00:00:09") {
		t.Errorf("link: %s", l)
	}
	// Names are those of the network that is asked.
	if got := e.must("run", "--rm", "--network", "back", "bb", "nslookup", "api"); !strings.Contains(got, "10.62.0.2") {
		t.Errorf("api leads to %s", got)
	}
	if r := e.run("run", "--rm", "--network", "front", "bb", "nslookup", "api"); r.code == 0 && strings.Contains(r.out, "10.62") {
		t.Errorf("api is known on front: %s", r)
	}
	// Without the first of its gateways another leads on.
	e.must("networks", "disconnect", "back", "app")
	if r := e.must("exec", "app", "ip", "route"); !strings.Contains(r, "default via 10.61.0.1 dev pub0") {
		t.Errorf("routes:\n%s", r)
	}
	// A service over several containers; one that stops is left out, also by an
	// engine that took over.
	for _, n := range []string{"db1", "db2"} {
		e.must("run", "-d", "--name", n, "--network", "name=store,alias=db", "--hostname", n, "bb", "sh", "-c", "exec nc -ll -p 80 -e hostname")
	}
	e.must("run", "-d", "--name", "client", "--network", "store", "bb", "sleep", "1000")
	// The static busybox resolves names with nslookup alone.
	ns := strings.Fields(e.must("exec", "client", "nslookup", "db"))
	vip := ""
	for i, w := range ns {
		if w == "Address:" && strings.HasPrefix(ns[i+1], "10.63.") {
			vip = ns[i+1]
		}
	}
	ask := func() map[string]int {
		got := map[string]int{}
		for l := range strings.Lines(e.run("exec", "client", "sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do nc -w 2 "+vip+" 80 < /dev/null || echo none; done").out) {
			got[strings.TrimSpace(l)]++
		}
		return got
	}
	harness.Eventually(t, "both answer", 20*time.Second, func() bool { g := ask(); return g["db1"] > 0 && g["db2"] > 0 && len(g) == 2 })
	if n := e.must("exec", "client", "nslookup", "db"); strings.Count(n, "10.63.0.") != 1 {
		t.Errorf("db leads to %s", n)
	}
	e.must("kill", "db1")
	harness.Eventually(t, "db1 is left out", 10*time.Second, func() bool { g := ask(); return g["db2"] == 16 })
	e.Kill()
	e.Boot()
	e.must("start", "db1")
	harness.Eventually(t, "db1 is back", 20*time.Second, func() bool { g := ask(); return g["db1"] > 0 && g["db2"] > 0 && len(g) == 2 })
	for args, want := range map[string]string{
		"-d nosuch x": "network driver \"nosuch\" not found", "--ipam-driver nosuch x": "address driver \"nosuch\" not found",
		"-d macvlan --ipam-driver dhcp --subnet 10.9.0.0/24 -o parent=lo x": "the DHCP server's to say",
		"-o com.servin.network.bandwidth=fast x":                            "cannot use option com.servin.network.bandwidth",
	} {
		if r := e.run(append([]string{"networks", "create"}, strings.Fields(args)...)...); r.code == 0 || !strings.Contains(r.err, want) {
			t.Errorf("%s: %s, want %q", args, r, want)
		}
	}
	// Links of old clients: environment and hosts file.
	e.must("run", "-d", "--name", "old", "--expose", "80", "-e", "COLOUR=red", "bb", "sleep", "1000")
	// One that shares another's network is reached by way of that.
	e.must("run", "-d", "--name", "shares", "--network", "container:old", "bb", "sleep", "1000")
	if out := e.must("run", "--rm", "--link", "shares:s", "bb", "sh", "-c", "grep -w s /etc/hosts | cut -f1"); out != e.must("inspect", "--format", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "old") {
		t.Errorf("a link to one that shares a network: %q", out)
	}
	got := e.must("run", "--rm", "--link", "old:o", "bb", "sh", "-c", "env; cat /etc/hosts")
	for _, want := range []string{"O_PORT_80_TCP_PORT=80", "O_ENV_COLOUR=red", "O_NAME=/"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in\n%s", want, got)
		}
	}
	if !strings.Contains(got, "\to old ") && !strings.Contains(got, "\to ") {
		t.Errorf("the link is not in the hosts file:\n%s", got)
	}
}
