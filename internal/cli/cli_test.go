package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/tree"
)

var update = flag.Bool("update", false, "write golden files and docs/cli")

// call runs a command line against an engine that h plays.
func call(t *testing.T, h http.HandlerFunc, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	e := map[string]string{"HOME": t.TempDir()}
	if h != nil {
		sock := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", sock)
		if err != nil {
			t.Fatal(err)
		}
		srv := &http.Server{Handler: h}
		go srv.Serve(l)
		defer srv.Close()
		e["SERVIN_HOST"] = "unix://" + sock
	}
	for k, v := range env {
		e[k] = v
	}
	in, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	var out, errb bytes.Buffer
	code = Main(context.Background(), Config{Args: append([]string{"servin"}, args...), Stdin: in, Stdout: &out, Stderr: &errb,
		Getenv:    func(k string) string { return e[k] },
		LookupEnv: func(k string) (string, bool) { v, ok := e[k]; return v, ok },
		Environ:   func() []string { return nil }, Version: "test", Commit: func() string { return "none" }})
	return code, out.String(), errb.String()
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	p := filepath.Join("testdata", name)
	if *update {
		os.MkdirAll(filepath.Dir(p), 0o755)
		if err := os.WriteFile(p, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(p)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs (go test -update writes it anew); got\n%s", name, got)
	}
}

func TestHelpTexts(t *testing.T) {
	for _, words := range []string{"", "run", "containers", "images", "ps", "exec", "system", "login"} {
		_, out, _ := call(t, nil, nil, append(strings.Fields(words), "--help")...)
		golden(t, "help-"+strings.ReplaceAll(words, " ", "-")+".txt", []byte(out))
	}
}

func TestReference(t *testing.T) {
	pages, err := Reference()
	if err != nil {
		t.Fatal(err)
	}
	dir := "../../docs/cli"
	for name, text := range pages {
		p := filepath.Join(dir, name)
		if *update {
			if err := os.WriteFile(p, text, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if old, err := os.ReadFile(p); err != nil || !bytes.Equal(old, text) {
			t.Errorf("%s is not what the table of commands says: go run ./internal/cli/gendocs", p)
		}
	}
}

// Every command is whole: it says what it does, its flags do not clash, and its
// short form and its long form agree.
func TestTree(t *testing.T) {
	a := &App{}
	seen := 0
	command.Walk(a.root(), "servin", func(c *command.Command, path string) {
		seen++
		if c.Sub == nil && c.Run == nil {
			t.Errorf("%s does nothing", path)
		}
		if path != "servin" && c.Short == "" {
			t.Errorf("%s does not say what it does", path)
		}
		if c.Min > 0 && c.Args == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: arguments or a full stop", path)
		}
		fs := new(command.FlagSet)
		if c.Flags != nil {
			c.Flags(fs)
		}
		names := map[string]bool{}
		for _, f := range fs.All() {
			for _, n := range []string{"--" + f.Name, "-" + f.Short} {
				if n != "-" && names[n] {
					t.Errorf("%s has two flags %s", path, n)
				}
				names[n] = true
			}
			if f.Help == "" {
				t.Errorf("%s --%s does not say what it does", path, f.Name)
			}
		}
		if c.Sub != nil {
			words := map[string]bool{}
			for _, s := range c.Sub() {
				for _, w := range append([]string{s.Name}, s.Aliases...) {
					if words[w] {
						t.Errorf("%s has two commands %s", path, w)
					}
					words[w] = true
				}
			}
		}
	})
	if seen < 100 {
		t.Errorf("only %d commands", seen)
	}
}

// Docker's flags of run, but for what no engine has any more.
func TestRunHasDockersFlags(t *testing.T) {
	fs := new(command.FlagSet)
	(&App{}).cmdRun().Flags(fs)
	has := map[string]string{}
	for _, f := range fs.All() {
		has[f.Name] = f.Short
	}
	for _, f := range strings.Fields(`add-host annotation attach/a blkio-weight blkio-weight-device cap-add cap-drop cgroup-parent cgroupns cidfile cpu-period
		cpu-quota cpu-rt-period cpu-rt-runtime cpu-shares/c cpus cpuset-cpus cpuset-mems detach/d detach-keys device device-cgroup-rule device-read-bps
		device-read-iops device-write-bps device-write-iops dns dns-option dns-search domainname entrypoint env/e env-file expose gpus group-add health-cmd
		health-interval health-retries health-start-interval health-start-period health-timeout hostname/h init interactive/i ip ip6 ipc isolation label/l
		label-file link link-local-ip log-driver log-opt mac-address memory/m memory-reservation memory-swap memory-swappiness mount name network network-alias
		no-healthcheck oom-kill-disable oom-score-adj pid pids-limit platform privileged publish/p publish-all/P pull quiet/q read-only restart rm runtime
		security-opt shm-size sig-proxy stop-signal stop-timeout storage-opt sysctl tmpfs tty/t ulimit use-api-socket user/u userns uts volume/v volume-driver
		volumes-from workdir/w publish-through restart-unhealthy`) {
		name, short, _ := strings.Cut(f, "/")
		if s, ok := has[name]; !ok || s != short {
			t.Errorf("--%s: there %v, short %q", name, ok, s)
		}
	}
}

func TestSpec(t *testing.T) {
	dir := t.TempDir()
	profile := filepath.Join(dir, "seccomp.json")
	os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), 0o600)
	for line, want := range map[string]string{ // JSON that must be in the request, "" for a refusal
		"img":                                   `{"Config":{"Image":"img"}}`,
		"img a b":                               `{"Config":{"Cmd":["a","b"]}}`,
		"--entrypoint  img":                     `{"Config":{"Entrypoint":["img"]}}`,
		"--entrypoint= img":                     `{"Config":{"Entrypoint":[""]}}`,
		"-it img":                               `{"Config":{"Tty":true,"OpenStdin":true}}`,
		"-e A=b -e HOME -e NOPE img":            `{"Config":{"Env":["A=b","HOME=/h","NOPE"]}}`,
		"--no-healthcheck img":                  `{"Config":{"Healthcheck":{"Test":["NONE"]}}}`,
		"--health-cmd x --health-retries 2 img": `{"Config":{"Healthcheck":{"Test":["CMD-SHELL","x"],"Retries":2}}}`,
		"--health-interval 5s img":              `{"Config":{"Healthcheck":{"Interval":5000000000}}}`,
		"--stop-timeout 0 img":                  `{"Config":{"StopTimeout":0}}`,
		"-p 8080:80 --expose 90 img":            `{"Config":{"ExposedPorts":{"80/tcp":{},"90/tcp":{}}},"HostConfig":{"PortBindings":{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}}}`,
		"-v /v -v a:/b img":                     `{"Config":{"Volumes":{"/v":{}}},"HostConfig":{"Binds":["a:/b"]}}`,
		"--tmpfs /t:size=1m img":                `{"HostConfig":{"Tmpfs":{"/t":"size=1m"}}}`,
		"-m 64m --memory-swap -1 --cpus 1.5 --pids-limit 9 img": `{"HostConfig":{"Memory":67108864,"MemorySwap":-1,"NanoCpus":1500000000,"PidsLimit":9}}`,
		"--memory-swappiness 0 img":                             `{"HostConfig":{"MemorySwappiness":0}}`,
		"--oom-kill-disable img":                                `{"HostConfig":{"OomKillDisable":true}}`,
		"--restart on-failure:3 img":                            `{"HostConfig":{"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3}}}`,
		"--restart-unhealthy --publish-through img":             `{"Extra":{"RestartUnhealthy":true,"PublishThrough":true}}`,
		"--init img":        `{"HostConfig":{"Init":true}}`,
		"--init=false img":  `{"HostConfig":{"Init":false}}`,
		"--userns auto img": `{"HostConfig":{"UsernsMode":"auto"}}`,
		"--device /dev/null:/dev/x:r --device v.com/c=n img": `{"HostConfig":{"Devices":[{"PathOnHost":"/dev/null","PathInContainer":"/dev/x","CgroupPermissions":"r"}],"DeviceRequests":[{"Driver":"cdi","DeviceIDs":["v.com/c=n"]}]}}`,
		"--gpus all img":                                                    `{"HostConfig":{"DeviceRequests":[{"Count":-1}]}}`,
		"--ulimit nofile=1:2 img":                                           `{"HostConfig":{"Ulimits":[{"Name":"nofile","Soft":1,"Hard":2}]}}`,
		"--dns 1.1.1.1 --add-host a:1.2.3.4 img":                            `{"HostConfig":{"Dns":["1.1.1.1"],"ExtraHosts":["a:1.2.3.4"]}}`,
		"--log-driver json-file --log-opt max-size=1m img":                  `{"HostConfig":{"LogConfig":{"Type":"json-file","Config":{"max-size":"1m"}}}}`,
		"--security-opt no-new-privileges --security-opt label=disable img": `{"HostConfig":{"SecurityOpt":["no-new-privileges","label=disable"]}}`,
		"--security-opt seccomp=" + profile + " img":                        `{"HostConfig":{"SecurityOpt":["seccomp={\"defaultAction\":\"SCMP_ACT_ALLOW\"}"]}}`,
		"--security-opt systempaths=unconfined img":                         `{"HostConfig":{"MaskedPaths":[],"ReadonlyPaths":[]}}`,
		"--network host img":                                                `{"HostConfig":{"NetworkMode":"host"}}`,
		"--network n --ip 10.0.0.2 --network-alias a img":                   `{"HostConfig":{"NetworkMode":"n"},"NetworkingConfig":{"EndpointsConfig":{"n":{"Aliases":["a"],"IPAMConfig":{"IPv4Address":"10.0.0.2"}}}}}`,
		"--network name=n,alias=x --network m img":                          `{"HostConfig":{"NetworkMode":"n"},"NetworkingConfig":{"EndpointsConfig":{"n":{"Aliases":["x"]},"m":{}}}}`,
		"--mac-address 02:00:00:00:00:01 img":                               `{"HostConfig":{"NetworkMode":"default"},"NetworkingConfig":{"EndpointsConfig":{"default":{"MacAddress":"02:00:00:00:00:01"}}}}`,
		"--network container:c img":                                         `{"HostConfig":{"NetworkMode":"container:c"}}`,
		"-l a=b --annotation c=d --sysctl e=f --storage-opt size=1G img":    `{"Config":{"Labels":{"a":"b"}},"HostConfig":{"Annotations":{"c":"d"},"Sysctls":{"e":"f"},"StorageOpt":{"size":"1G"}}}`,

		"--no-healthcheck --health-cmd x img":     "",
		"--health-retries -1 img":                 "",
		"--rm --restart always img":               "",
		"--memory-swappiness 101 img":             "",
		"--oom-score-adj 2000 img":                "",
		"--dns x img":                             "",
		"--network host --network n img":          "",
		"--network n --network n img":             "",
		"--network container:c -p 1:1 img":        "",
		"--network container:c --hostname x img":  "",
		"--network name=n,ip=x img":               "",
		"--ip x img":                              "",
		"--security-opt nonsense img":             "",
		"--security-opt foo=bar img":              "",
		"--security-opt seccomp=/nonexistent img": "",
		"--security-opt systempaths=x img":        "",
		"--log-driver none --log-opt a=b img":     "",
		"--env-file /nonexistent img":             "",
		"--device x img":                          "",
		"-v x img":                                "",
	} {
		a := &App{Config: Config{Getenv: func(string) string { return "" }, LookupEnv: func(k string) (string, bool) { return "/h", k == "HOME" }}}
		var o createFlags
		fs := new(command.FlagSet)
		o.declare(fs)
		args, err := fs.Parse(strings.Split(line, " "), false)
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		if strings.HasPrefix(line, "--entrypoint  ") {
			args, o.entrypoint = []string{"x"}, "img"
		}
		s, err := a.build(&o, args)
		if want == "" {
			var ee *exitError
			if err == nil || !errors.As(err, &ee) || ee.code != 125 {
				t.Errorf("%s: %v", line, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", line, err)
			continue
		}
		b, err := json.Marshal(api.RunRequest{Config: s.config, HostConfig: s.host, Networking: s.net, Extra: s.extra})
		if err != nil {
			t.Fatal(err)
		}
		var got, part any
		json.Unmarshal(b, &got)
		if err := json.Unmarshal([]byte(want), &part); err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		if !contains(got, part) {
			t.Errorf("%s:\n got %s\nwant %s in it", line, b, want)
		}
	}
}

// contains reports whether all of part is in whole.
func contains(whole, part any) bool {
	switch p := part.(type) {
	case map[string]any:
		w, ok := whole.(map[string]any)
		if !ok {
			return false
		}
		for k, v := range p {
			if !contains(w[k], v) {
				return false
			}
		}
		return true
	case []any:
		w, ok := whole.([]any)
		if !ok || len(w) != len(p) {
			return false
		}
		for i := range p {
			if !contains(w[i], p[i]) {
				return false
			}
		}
		return true
	}
	return reflect.DeepEqual(whole, part)
}

func TestPortsText(t *testing.T) {
	v4, v6 := netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("::")
	type P = container.PortSummary
	for want, in := range map[string][]P{
		"":       nil,
		"80/tcp": {{PrivatePort: 80, Type: "tcp"}},
		"0.0.0.0:8080->80/tcp, [::]:8080->80/tcp": {{IP: v6, PrivatePort: 80, PublicPort: 8080, Type: "tcp"}, {IP: v4, PrivatePort: 80, PublicPort: 8080, Type: "tcp"}},
		"0.0.0.0:8000-8002->80-82/tcp":            {{IP: v4, PrivatePort: 81, PublicPort: 8001, Type: "tcp"}, {IP: v4, PrivatePort: 80, PublicPort: 8000, Type: "tcp"}, {IP: v4, PrivatePort: 82, PublicPort: 8002, Type: "tcp"}},
		"0.0.0.0:9->80/tcp, 0.0.0.0:8->81/tcp":    {{IP: v4, PrivatePort: 80, PublicPort: 9, Type: "tcp"}, {IP: v4, PrivatePort: 81, PublicPort: 8, Type: "tcp"}},
		"53/tcp, 53/udp, 80-81/udp":               {{PrivatePort: 53, Type: "udp"}, {PrivatePort: 53, Type: "tcp"}, {PrivatePort: 80, Type: "udp"}, {PrivatePort: 81, Type: "udp"}},
	} {
		if got := portsText(in); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestCPUAndMemory(t *testing.T) {
	var s container.StatsResponse
	s.CPUStats.CPUUsage.TotalUsage, s.PreCPUStats.CPUUsage.TotalUsage = 300, 100
	s.CPUStats.SystemUsage, s.PreCPUStats.SystemUsage = 2000, 1000
	s.CPUStats.OnlineCPUs = 2
	if p := cpuPercent(&s); p != 40 {
		t.Error(p)
	}
	s.PreCPUStats.CPUUsage.TotalUsage = 400 // a counter that went back
	if p := cpuPercent(&s); p != 0 {
		t.Error(p)
	}
	for _, k := range []string{"total_inactive_file", "inactive_file"} {
		if n := memUsed(&container.MemoryStats{Usage: 100, Stats: map[string]uint64{k: 30}}); n != 70 {
			t.Error(k, n)
		}
	}
	if n := memUsed(&container.MemoryStats{Usage: 100, Stats: map[string]uint64{"inactive_file": 200}}); n != 100 {
		t.Error(n)
	}
}

func TestSplitPath(t *testing.T) {
	for in, want := range map[string][2]string{"c:/a": {"c", "/a"}, "c:a": {"c", "a"}, "c:": {"c", "/"}, "/a:b": {"", "/a:b"}, "./a:b": {"", "./a:b"}, "a": {"", "a"}, "-": {"", "-"}} {
		if c, p := splitPath(in); c != want[0] || p != want[1] {
			t.Errorf("%q: %q %q", in, c, p)
		}
	}
}

func TestPlaceOut(t *testing.T) {
	dir := t.TempDir()
	f := filepath.Join(dir, "file")
	os.WriteFile(f, nil, 0o600)
	stat := func(p string) fs.FileInfo { st, _ := os.Stat(p); return st }
	type want struct{ from, to, dir string }
	for name, x := range map[string]struct {
		st       container.PathStat
		src, dst string
		want     want
	}{
		"file to a name":      {container.PathStat{Name: "f"}, "/f", dir + "/new", want{"f", "new", dir}},
		"file over a file":    {container.PathStat{Name: "f"}, "/f", f, want{"f", "file", dir}},
		"file into a dir":     {container.PathStat{Name: "f"}, "/f", dir, want{"f", "f", dir}},
		"file to no dir":      {container.PathStat{Name: "f"}, "/f", dir + "/new/", want{}},
		"dir to a name":       {container.PathStat{Name: "d", Mode: fs.ModeDir}, "/d", dir + "/new", want{"d", "new", dir}},
		"dir to a name slash": {container.PathStat{Name: "d", Mode: fs.ModeDir}, "/d", dir + "/new/", want{"d", "new", dir}},
		"dir into a dir":      {container.PathStat{Name: "d", Mode: fs.ModeDir}, "/d", dir, want{"d", "d", dir}},
		"contents into a dir": {container.PathStat{Name: "d", Mode: fs.ModeDir}, "/d/.", dir, want{".", "", dir}},
		"dir over a file":     {container.PathStat{Name: "d", Mode: fs.ModeDir}, "/d", f, want{}},
		"hostile name":        {container.PathStat{Name: "../../x"}, "/x", dir, want{"../../x", "x", dir}},
	} {
		var o tree.ExtractOptions
		o.From = x.st.Name
		got, err := placeOut(&o, x.st, x.src, x.dst, stat(x.dst))
		if x.want == (want{}) {
			if err == nil {
				t.Errorf("%s: no error", name)
			}
			continue
		}
		if g := (want{o.From, o.To, got}); err != nil || g != x.want {
			t.Errorf("%s: %+v %v, want %+v", name, g, err, x.want)
		}
	}
}

func TestExitCodes(t *testing.T) {
	refuse := func(status int, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(status); io.WriteString(w, body) }
	}
	for name, x := range map[string]struct {
		h      http.HandlerFunc
		args   string
		code   int
		stderr string
	}{
		"list fails":        {refuse(500, `{"message":"boom"}`), "ps", 1, "servin: boom\n"},
		"run refused":       {refuse(400, `{"message":"bad request"}`), "run x", 125, "servin: bad request\n"},
		"unknown flag":      {nil, "ps --nope", 125, "servin: unknown flag: --nope\nSee 'servin ps --help'\n"},
		"too few arguments": {nil, "rm", 1, "servin: needs at least 1 argument (CONTAINER [CONTAINER...])\nSee 'servin rm --help'\n"},
		"one message twice": {refuse(404, `{"message":"No such container"}`), "stop a b", 1, "servin: No such container\n"},
		"vm":                {nil, "vm start", 1, "servin: cannot find the program servin-vmd"},
		"search":            {refuse(501, `{"message":"cannot search x: the registry has no search"}`), "search x", 1, "servin: cannot search"},
	} {
		code, out, errb := call(t, x.h, nil, strings.Fields(x.args)...)
		if code != x.code || out != "" || !strings.HasPrefix(errb, x.stderr) {
			t.Errorf("%s: %d %q %q", name, code, out, errb)
		}
	}
}

func TestUnreachable(t *testing.T) {
	for host, want := range map[string]string{
		"unix:///nonexistent/s": "is servind running? Start it with",
		"tcp://127.0.0.1:1":     "is servind listening there",
		"nonsense":              "cannot use host",
	} {
		code, _, errb := call(t, nil, map[string]string{"SERVIN_HOST": host}, "ps")
		if code != 1 || !strings.Contains(errb, want) {
			t.Errorf("%s: %d %q", host, code, errb)
		}
		if code, _, _ := call(t, nil, map[string]string{"SERVIN_HOST": host}, "run", "x"); code != 125 {
			t.Errorf("run at %s: %d", host, code)
		}
	}
	// Docker's variable is another engine's.
	if _, _, errb := call(t, nil, map[string]string{"DOCKER_HOST": "tcp://127.0.0.1:1", "SERVIN_HOST": "unix:///x"}, "ps"); !strings.Contains(errb, "unix:///x") {
		t.Error(errb)
	}
}

func TestPrecedence(t *testing.T) {
	home := t.TempDir()
	env := map[string]string{"HOME": home}
	if code, _, e := call(t, nil, env, "context", "create", "lab", "--host", "unix:///from/context"); code != 0 {
		t.Fatal(e)
	}
	if code, _, e := call(t, nil, env, "context", "use", "lab"); code != 0 {
		t.Fatal(e)
	}
	for want, args := range map[string][]string{
		"/from/context": {"ps"},
		"/from/flag":    {"--host", "unix:///from/flag", "ps"},
	} {
		if _, _, e := call(t, nil, env, args...); !strings.Contains(e, want) {
			t.Errorf("%v: %q", args, e)
		}
	}
	env["SERVIN_HOST"] = "unix:///from/env"
	if _, _, e := call(t, nil, env, "ps"); !strings.Contains(e, "/from/env") {
		t.Error(e)
	}
	if _, _, e := call(t, nil, env, "--context", "lab", "ps"); !strings.Contains(e, "/from/context") {
		t.Error(e)
	}
	if code, _, _ := call(t, nil, env, "--context", "lab", "--host", "unix:///x", "ps"); code != 125 {
		t.Error(code)
	}
}

func TestImageRows(t *testing.T) {
	h := func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `[{"Id":"sha256:aaaaaaaaaaaaaaaaaaaa","Created":100,"RepoTags":["h:5000/x:1","y:2"],"RepoDigests":["h:5000/x@sha256:d1"],"Size":1500000},
			{"Id":"sha256:bbbbbbbbbbbbbbbbbbbb","Created":200,"RepoTags":[],"RepoDigests":["z@sha256:d2"],"Size":5},
			{"Id":"sha256:cccccccccccccccccccc","Created":50,"RepoTags":null,"Size":5}]`)
	}
	for args, want := range map[string]string{
		"-q": "bbbbbbbbbbbb\naaaaaaaaaaaa\ncccccccccccc\n",
		"--format {{.Repository}}:{{.Tag}}={{.Size}}": "z:<none>=5B\nh:5000/x:1=1.5MB\ny:2=1.5MB\n<none>:<none>=5B\n",
		"--format {{.Repository}}@{{.Digest}}":        "z@sha256:d2\nh:5000/x@sha256:d1\ny@<none>\n<none>@<none>\n",
		"--no-trunc --format {{.ID}}":                 "sha256:bbbbbbbbbbbbbbbbbbbb\nsha256:aaaaaaaaaaaaaaaaaaaa\nsha256:aaaaaaaaaaaaaaaaaaaa\nsha256:cccccccccccccccccccc\n",
	} {
		code, out, errb := call(t, h, nil, append([]string{"images"}, strings.Fields(args)...)...)
		if code != 0 || out != want {
			t.Errorf("%s: %d %s\n got %q\nwant %q", args, code, errb, out, want)
		}
	}
}

func TestFullName(t *testing.T) {
	for in, want := range map[string]string{"alpine": "docker.io/library/alpine:latest", "a/b:1": "docker.io/a/b:1", "h:5000/a:1": "h:5000/a:1", "a@sha256:x": "docker.io/library/a@sha256:x"} {
		n, tag := client.SplitTag(in)
		if got := fullName(n, pick(tag, "latest")); got != want {
			t.Errorf("%s: %s", in, got)
		}
	}
}

func TestNaturally(t *testing.T) {
	list := []string{"a2", "a10", "a1", "b", "a01x"}
	want := []string{"a1", "a01x", "a2", "a10", "b"}
	got := append([]string(nil), list...)
	for i := range got {
		for j := i + 1; j < len(got); j++ {
			if naturally(got[j], got[i]) < 0 {
				got[i], got[j] = got[j], got[i]
			}
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Error(got)
	}
}
