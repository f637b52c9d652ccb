package spec

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
)

var update = flag.Bool("update", false, "write the golden files anew")

func load(t *testing.T, yaml string) *types.Project {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "compose.yaml")
	for name, text := range map[string]string{"compose.yaml": yaml, "tok.txt": "t", "seccomp.json": "{\n \"defaultAction\": \"SCMP_ACT_ALLOW\"\n}"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	o, err := cli.NewProjectOptions([]string{file}, cli.WithName("p"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := o.LoadProject(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	p.Environment = types.Mapping{"TOKEN": "secret"}
	return p
}

// golden compares v's JSON, with the test's folder as DIR.
func golden(t *testing.T, name, dir string, v any) {
	t.Helper()
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetIndent("", " ")
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	got := strings.ReplaceAll(buf.String(), dir, "DIR")
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: got\n%s\nwant\n%s", name, got, want)
	}
}

const everything = `services:
  full:
    image: full:1
    platform: linux/amd64
    hostname: h
    domainname: example.com
    user: "1000:1000"
    working_dir: /w
    command: ["a", "b c"]
    entrypoint: ["/e"]
    environment: {B: "2", A: "1", EMPTY: ""}
    expose: ["90", "5000-5001/udp"]
    ports: ["127.0.0.1:8080:80", "53:53/udp", "443"]
    tty: true
    stdin_open: true
    stop_signal: SIGUSR1
    stop_grace_period: 1m30s
    healthcheck: {test: "curl -f localhost", interval: 5s, timeout: 2s, retries: 4, start_period: 10s, start_interval: 1s}
    labels: {x: y}
    cap_add: [NET_ADMIN]
    cap_drop: [ALL]
    init: true
    ipc: shareable
    pid: host
    uts: host
    cgroup: private
    read_only: false
    restart: on-failure:3
    shm_size: 64m
    sysctls: {net.ipv4.ip_forward: "1"}
    dns: [1.1.1.1]
    dns_search: [example.com]
    dns_opt: ["ndots:2"]
    extra_hosts: ["b:10.0.0.2", "a:10.0.0.1"]
    security_opt: ["no-new-privileges:true", "seccomp:seccomp.json", "systempaths=unconfined"]
    storage_opt: {size: 1G}
    userns_mode: host
    privileged: false
    tmpfs: ["/t:size=1m", "/u"]
    runtime: crun
    group_add: ["27"]
    oom_score_adj: 100
    oom_kill_disable: false
    annotations: {k: v}
    cgroup_parent: parent
    cpu_shares: 10
    cpuset: "0"
    mem_swappiness: 5
    memswap_limit: 200m
    blkio_config:
      weight: 300
      weight_device: [{path: /dev/sda, weight: 400}]
      device_read_bps: [{path: /dev/sda, rate: 12mb}]
      device_write_iops: [{path: /dev/sda, rate: 30}]
    devices: ["/dev/null:/dev/nil:r", "vendor.com/class=name"]
    device_cgroup_rules: ["c 1:3 mr"]
    gpus: [{driver: nvidia, count: 1}]
    ulimits: {nproc: 65535, nofile: {soft: 20, hard: 40}}
    logging: {driver: json-file, options: {max-size: 1m}}
    deploy:
      resources:
        limits: {cpus: "0.5", memory: 50M, pids: 7}
        reservations: {memory: 20M, devices: [{capabilities: [gpu], count: all}]}
      restart_policy: {condition: any, max_attempts: 2}
    networks:
      front: {aliases: [www], ipv4_address: 10.7.0.9, priority: 10, mac_address: "02:42:ac:11:65:43", interface_name: eth7}
      back: {gw_priority: 3, link_local_ips: [169.254.1.1]}
    volumes:
    - data:/data:ro
    - ./src:/src
    - /anon
    - {type: bind, source: ./strict, target: /strict, bind: {create_host_path: false, propagation: rshared}}
    - {type: volume, source: data, target: /sub, volume: {subpath: s, nocopy: true}}
    - {type: tmpfs, target: /tm, tmpfs: {size: 1048576, mode: 0o700}}
    - {type: image, source: other, target: /img, image: {subpath: d}}
    secrets: [file, {source: theirs, uid: "5"}, {source: env, target: renamed, uid: "1", gid: "2", mode: 0o400}]
    configs: [inline, {source: file, target: /etc/file}]
networks:
  front: {driver: bridge, driver_opts: {com.docker.network.bridge.name: br7}, internal: true, enable_ipv6: true, labels: {l: m},
    ipam: {driver: default, config: [{subnet: 10.7.0.0/24, gateway: 10.7.0.1, ip_range: 10.7.0.128/25, aux_addresses: {router: 10.7.0.2}}]}}
  back: {name: their-back, attachable: true}
volumes:
  data: {driver: local, driver_opts: {type: tmpfs, device: tmpfs}, labels: {l: m}}
secrets:
  file: {file: ./tok.txt}
  theirs: {external: true, name: real}
  env: {environment: TOKEN}
configs:
  file: {file: ./tok.txt}
  inline: {content: "text"}
`

func TestEverything(t *testing.T) {
	p := load(t, everything)
	s := p.Services["full"]
	s.CustomLabels = types.Labels{"com.docker.compose.project": "p"}
	got, err := Container(p, s, "p-full-2", Options{Separator: "-", Number: 2, Aliases: true,
		Inherit:      []container.MountPoint{{Type: mount.TypeVolume, Name: "old", Destination: "/anon", RW: true}, {Type: mount.TypeVolume, Name: "img", Destination: "/declared", RW: true}, {Type: mount.TypeVolume, Name: "no", Destination: "/gone"}},
		ImageVolumes: map[string]struct{}{"/declared": {}}})
	if err != nil {
		t.Fatal(err)
	}
	// The hash has the folder in it, which differs from run to run.
	got.Config.Labels["com.docker.compose.config-hash"] = "HASH"
	golden(t, "container", p.WorkingDir, got)
	for _, key := range []string{"front", "back"} {
		n, err := Network(p, key)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "network-"+key, p.WorkingDir, n)
	}
	v, err := Volume(p, "data")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "volume", p.WorkingDir, v)
	files, err := Files(p, &s)
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "files", p.WorkingDir, files)
}

func TestRefused(t *testing.T) {
	for name, c := range map[string]struct{ yaml, want string }{
		"mac":      {"services:\n  a: {image: a, mac_address: nonsense}", "is not a MAC address"},
		"address":  {"services:\n  a: {image: a, networks: {n: {ipv4_address: 1.2.3}}}\nnetworks: {n: {}}", "is not an address"},
		"dns":      {"services:\n  a: {image: a, dns: [nonsense]}", "is not an address"},
		"seccomp":  {"services:\n  a: {image: a, security_opt: [\"seccomp:none.json\"]}", "cannot read the seccomp profile"},
		"security": {"services:\n  a: {image: a, security_opt: [nonsense]}", "is not KEY=VALUE"},
		"secret":   {"services:\n  a: {image: a, secrets: [s]}\nsecrets: {s: {file: ./none}}", "does not exist"},
		"cluster":  {"services:\n  a: {image: a, volumes: [{type: cluster, source: x, target: /x}]}", "needs a swarm"},
	} {
		t.Run(name, func(t *testing.T) {
			p := load(t, c.yaml)
			_, err := Container(p, p.Services["a"], "p-a-1", Options{Separator: "-", Number: 1})
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestSecretsStayOutOfARequest(t *testing.T) {
	p := load(t, "services:\n  a: {image: a, secrets: [s]}\nsecrets: {s: {environment: TOKEN}}")
	got, err := Container(p, p.Services["a"], "p-a-1", Options{Separator: "-", Number: 1})
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, []byte(`"secret"`)) {
		t.Errorf("the request holds the secret: %s", b)
	}
	s := p.Services["a"]
	s.ReadOnly = true
	if _, err := Files(p, &s); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("got %v", err)
	}
}
