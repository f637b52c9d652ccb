package notation

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"
)

// check compares a result in JSON with what is wanted; want "" is an error.
func check(t *testing.T, in string, got any, err error, want string) {
	t.Helper()
	if want == "" {
		if err == nil {
			b, _ := json.Marshal(got)
			t.Errorf("%q: no error, but %s", in, b)
		}
		return
	}
	if err != nil {
		t.Errorf("%q: %v", in, err)
		return
	}
	b, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	var g, w any
	json.Unmarshal(b, &g)
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatalf("bad want %s: %v", want, err)
	}
	if !reflect.DeepEqual(g, w) {
		t.Errorf("%q:\n got %s\nwant %s", in, b, want)
	}
}

func TestPorts(t *testing.T) {
	for in, want := range map[string]string{
		"80":                          `{"80/tcp":[{"HostIp":"","HostPort":""}]}`,
		"8080:80":                     `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`,
		"53:53/udp":                   `{"53/udp":[{"HostIp":"","HostPort":"53"}]}`,
		"53:53/UDP":                   `{"53/udp":[{"HostIp":"","HostPort":"53"}]}`,
		"9:9/sctp":                    `{"9/sctp":[{"HostIp":"","HostPort":"9"}]}`,
		"127.0.0.1:8080:80":           `{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"}]}`,
		"127.0.0.1::80":               `{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":""}]}`,
		"[::1]:8080:80":               `{"80/tcp":[{"HostIp":"::1","HostPort":"8080"}]}`,
		"[::1]::80":                   `{"80/tcp":[{"HostIp":"::1","HostPort":""}]}`,
		"::1:8080:80":                 `{"80/tcp":[{"HostIp":"::1","HostPort":"8080"}]}`,
		"8000-8001:80-81":             `{"80/tcp":[{"HostIp":"","HostPort":"8000"}],"81/tcp":[{"HostIp":"","HostPort":"8001"}]}`,
		"80-81":                       `{"80/tcp":[{"HostIp":"","HostPort":""}],"81/tcp":[{"HostIp":"","HostPort":""}]}`,
		"8000-8010:80":                `{"80/tcp":[{"HostIp":"","HostPort":"8000-8010"}]}`,
		"0:80":                        `{"80/tcp":[{"HostIp":"","HostPort":""}]}`,
		"target=80,published=8080":    `{"80/tcp":[{"HostIp":"","HostPort":"8080"}]}`,
		"target=53,protocol=udp":      `{"53/udp":[{"HostIp":"","HostPort":""}]}`,
		"mode=ingress,target=1":       `{"1/tcp":[{"HostIp":"","HostPort":""}]}`,
		"":                            "",
		"0":                           "",
		"x":                           "",
		"65536":                       "",
		"-1":                          "",
		"80/icmp":                     "",
		"8080:":                       "",
		"127.0.0.1:80":                "",
		"300.0.0.1:1:1":               "",
		"[::1]80:80":                  "",
		"[::1:80:80":                  "",
		"80-79":                       "",
		"1-3:1-2":                     "",
		"published=80":                "",
		"target=80,foo=1":             "",
		"target=80,mode=x":            "",
		"host.example:80:80":          "",
		"1:2:3:4:5:6:7:8:9:10:11:900": "",
	} {
		_, got, err := Ports([]string{in})
		check(t, in, got, err, want)
	}
}

func TestPortsMergeBindings(t *testing.T) {
	set, got, err := Ports([]string{"1.2.3.4:80:80", "81:80"})
	check(t, "two", got, err, `{"80/tcp":[{"HostIp":"1.2.3.4","HostPort":"80"},{"HostIp":"","HostPort":"81"}]}`)
	if len(set) != 1 {
		t.Errorf("exposed %v", set)
	}
}

func TestExpose(t *testing.T) {
	for in, n := range map[string]int{"80": 1, "80-89/udp": 10, "1/sctp": 1, "": -1, "x": -1, "0": -1, "5-1": -1, "1/x": -1} {
		set := network.PortSet{}
		err := Expose(in, set)
		if (err != nil) != (n < 0) || err == nil && len(set) != n {
			t.Errorf("%q: %v, %v", in, set, err)
		}
	}
}

func TestVolume(t *testing.T) {
	wd, _ := os.Getwd()
	for in, want := range map[string][2]string{
		"/data":              {"", "/data"},
		"vol:/data":          {"vol:/data", ""},
		"vol:/data:ro":       {"vol:/data:ro", ""},
		"/h:/data:ro,z":      {"/h:/data:ro,z", ""},
		"./x:/data":          {wd + "/x:/data", ""},
		".:/data":            {wd + ":/data", ""},
		"../x:/data":         {filepath.Join(wd, "../x") + ":/data", ""},
		"~/x:/data":          {"/home/u/x:/data", ""},
		"~:/data:U":          {"/home/u:/data:U", ""},
		`C:\x:/data`:         {`C:\x:/data`, ""},
		`c:/x:/data:ro`:      {`c:/x:/data:ro`, ""},
		"":                   {},
		"data":               {},
		"vol:data":           {},
		":/data":             {},
		"vol:":               {},
		"a:/b:c:d":           {},
		"vol:/data:":         {},
		"vol::ro":            {},
		"/src:relative:ro":   {},
		"vol:/data:ro:extra": {},
	} {
		bind, anon, err := Volume(in, "/home/u")
		if want == [2]string{} {
			if err == nil {
				t.Errorf("%q: no error, but %q %q", in, bind, anon)
			}
			continue
		}
		if err != nil || bind != want[0] || anon != want[1] {
			t.Errorf("%q: %q %q %v, want %q", in, bind, anon, err, want)
		}
	}
}

func TestMount(t *testing.T) {
	for in, want := range map[string]string{
		"type=bind,source=/a,target=/b":                                                `{"Type":"bind","Source":"/a","Target":"/b"}`,
		"type=bind,src=/a,dst=/b,readonly":                                             `{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true}`,
		"type=bind,src=/a,dst=/b,ro=false":                                             `{"Type":"bind","Source":"/a","Target":"/b"}`,
		"source=v,target=/b":                                                           `{"Type":"volume","Source":"v","Target":"/b"}`,
		"type=volume,target=/b,volume-nocopy":                                          `{"Type":"volume","Target":"/b","VolumeOptions":{"NoCopy":true}}`,
		"type=volume,src=v,dst=/b,volume-subpath=x/y":                                  `{"Type":"volume","Source":"v","Target":"/b","VolumeOptions":{"Subpath":"x/y"}}`,
		`type=volume,src=v,dst=/b,volume-driver=local,"volume-opt=o=size=1,uid=2"`:     `{"Type":"volume","Source":"v","Target":"/b","VolumeOptions":{"DriverConfig":{"Name":"local","Options":{"o":"size=1,uid=2"}}}}`,
		"type=volume,src=v,dst=/b,volume-label=a=b":                                    `{"Type":"volume","Source":"v","Target":"/b","VolumeOptions":{"Labels":{"a":"b"}}}`,
		"type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1770":                              `{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":1048576,"Mode":1016}}`,
		"type=image,src=alpine,dst=/i,image-subpath=etc":                               `{"Type":"image","Source":"alpine","Target":"/i","ImageOptions":{"Subpath":"etc"}}`,
		"type=bind,src=/a,dst=/b,bind-propagation=rshared":                             `{"Type":"bind","Source":"/a","Target":"/b","BindOptions":{"Propagation":"rshared"}}`,
		"type=bind,src=/a,dst=/b,bind-nonrecursive":                                    `{"Type":"bind","Source":"/a","Target":"/b","BindOptions":{"NonRecursive":true}}`,
		"type=bind,src=/a,dst=/b,bind-recursive=disabled":                              `{"Type":"bind","Source":"/a","Target":"/b","BindOptions":{"NonRecursive":true}}`,
		"type=bind,src=/a,dst=/b,ro,bind-recursive=readonly,bind-propagation=rprivate": `{"Type":"bind","Source":"/a","Target":"/b","ReadOnly":true,"BindOptions":{"Propagation":"rprivate","ReadOnlyForceRecursive":true}}`,
		"type=bind,src=/a,dst=/b,U":                                                    `"/a:/b:U"`,
		"type=bind,src=/a,dst=/b,chown=true,relabel=private,ro,bind-propagation=slave": `"/a:/b:U,Z,ro,slave"`,
		"type=volume,src=v,dst=/b,idmap,u=false":                                       `"v:/b:idmap"`,
		"type=bind,src=~/a,dst=/b,consistency=cached":                                  `{"Type":"bind","Source":"/home/u/a","Target":"/b","Consistency":"cached"}`,
		"type=bind,src=/a,dst=/b,relabel=x":                                            "",
		"type=tmpfs,dst=/b,U":                                                          "",
		"type=volume,dst=/b,U":                                                         "",
		"type=bind,src=/a:b,dst=/b,U":                                                  "",
		"type=volume,src=v,dst=/b,U,volume-nocopy":                                     "",
		"":                                      "",
		"type=bind":                             "",
		"type=bind,dst=/b":                      "",
		"type=bind,src=/a":                      "",
		"type=x,dst=/b":                         "",
		"type=tmpfs,src=/a,dst=/b":              "",
		"type=volume,dst=/b,bind-nonrecursive":  "",
		"type=bind,src=/a,dst=/b,volume-nocopy": "",
		"dst=/b,foo=1":                          "",
		"dst=/b,readonly=maybe":                 "",
		"dst":                                   "",
		"type=tmpfs,dst=/t,tmpfs-size=x":        "",
		"type=tmpfs,dst=/t,tmpfs-mode=9":        "",
		"type=tmpfs,dst=/t,tmpfs-mode=77777":    "",
		`dst="/b`:                               "",
		"type=bind,src=/a,dst=/b,bind-propagation=x":         "",
		"type=bind,src=/a,dst=/b,bind-recursive=readonly":    "",
		"type=bind,src=/a,dst=/b,ro,bind-recursive=readonly": "",
		"type=volume,dst=/b,volume-label==x":                 "",
	} {
		m, bind, err := Mount(in, "/home/u")
		if bind != "" {
			check(t, in, bind, err, want)
			continue
		}
		check(t, in, m, err, want)
	}
}

func TestDevice(t *testing.T) {
	for in, want := range map[string][3]string{
		"/dev/x":           {"/dev/x", "/dev/x", "rwm"},
		"/dev/x:/dev/y":    {"/dev/x", "/dev/y", "rwm"},
		"/dev/x:r":         {"/dev/x", "/dev/x", "r"},
		"/dev/x:/dev/y:rw": {"/dev/x", "/dev/y", "rw"},
		"/dev/x:/dev/y:q":  {},
		"/dev/x:rr":        {},
		"x":                {},
		"/a:/b:r:m":        {},
		"":                 {},
		"/a:/b:":           {},
	} {
		d, err := Device(in)
		if want == [3]string{} {
			if err == nil {
				t.Errorf("%q: no error, but %+v", in, d)
			}
			continue
		}
		if got := [3]string{d.PathOnHost, d.PathInContainer, d.CgroupPermissions}; err != nil || got != want {
			t.Errorf("%q: %v %v, want %v", in, got, err, want)
		}
	}
}

func TestIsCDI(t *testing.T) {
	for in, want := range map[string]bool{"nvidia.com/gpu=all": true, "v/c=n": true, "/dev/x": false, "/dev/x=y": false, "v=n": false, "v/c=": false, "v/a/b=c": false} {
		if IsCDI(in) != want {
			t.Errorf("%q: %v", in, !want)
		}
	}
}

func TestDeviceRule(t *testing.T) {
	for in, ok := range map[string]bool{"c 42:* rmw": true, "a *:* rwm": true, "b 8:0 r": true, "x 1:1 r": false, "c 1 r": false, "c 1:1 q": false, "c 1:1": false, "ab 1:1 r": false, "c -1:1 r": false} {
		if _, err := DeviceRule(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestGPUs(t *testing.T) {
	const gpu = `"Capabilities":[["gpu"]],"Options":{}`
	for in, want := range map[string]string{
		"all":                                `{"Driver":"","Count":-1,"DeviceIDs":null,` + gpu + `}`,
		"2":                                  `{"Driver":"","Count":2,"DeviceIDs":null,` + gpu + `}`,
		"device=0":                           `{"Driver":"","Count":0,"DeviceIDs":["0"],` + gpu + `}`,
		`"device=0,2"`:                       `{"Driver":"","Count":0,"DeviceIDs":["0","2"],` + gpu + `}`,
		"driver=nvidia,count=1":              `{"Driver":"nvidia","Count":1,"DeviceIDs":null,` + gpu + `}`,
		"driver=nvidia":                      `{"Driver":"nvidia","Count":1,"DeviceIDs":null,` + gpu + `}`,
		`all,"capabilities=compute,utility"`: `{"Driver":"","Count":-1,"DeviceIDs":null,"Capabilities":[["compute","utility","gpu"]],"Options":{}}`,
		"":                                   "",
		"x":                                  "",
		"count=1,device=0":                   "",
		"count=1,count=2":                    "",
		"foo=1":                              "",
	} {
		r, err := GPUs(in)
		check(t, in, r, err, want)
	}
}

func TestReadNetwork(t *testing.T) {
	for in, want := range map[string]string{
		"bridge":        `["bridge",null]`,
		"container:a=b": `["container:a=b",null]`,
		"name=n,alias=a,alias=b,ip=10.0.0.9,ip6=fd00::9,mac-address=02:00:00:00:00:01,driver-opt=k=v,gw-priority=5,link-local-ip=169.254.1.1": `["n",{"a":["a","b"],"ip":"10.0.0.9","ip6":"fd00::9","mac":"02:00:00:00:00:01","opt":{"k":"v"},"prio":5,"ll":["169.254.1.1"]}]`,
		"alias=a":              "",
		"name=n,ip=x":          "",
		"name=n,ip=fd00::1":    "",
		"name=n,ip6=10.0.0.1":  "",
		"name=n,mac-address=":  `["n",{"a":null,"ip":null,"ip6":null,"mac":"","opt":null,"prio":0,"ll":null}]`,
		"name=n,foo=1":         "",
		"name=n,alias":         "",
		"name=n,gw-priority=x": "",
	} {
		n, err := ReadNetwork(in)
		var got any = []any{n.Name, nil}
		if strings.HasPrefix(in, "name=") {
			s := n.Settings
			m := map[string]any{"a": s.Aliases, "ip": nil, "ip6": nil, "mac": s.MacAddress.String(), "opt": s.DriverOpts, "prio": s.GwPriority, "ll": nil}
			if s.IPAMConfig != nil {
				m["ip"], m["ip6"], m["ll"] = s.IPAMConfig.IPv4Address, s.IPAMConfig.IPv6Address, s.IPAMConfig.LinkLocalIPs
			}
			got = []any{n.Name, m}
		}
		check(t, in, got, err, want)
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]int64{"1": 1, "1k": 1024, "1.5g": 1610612736, "2GiB": 2 << 30, "1MB": 1 << 20, "x": -9, "": -9, "-5m": -9} {
		got, err := Bytes(in)
		if (err != nil) != (want == -9) || err == nil && got != want {
			t.Errorf("Bytes(%q): %d, %v", in, got, err)
		}
	}
	for in, want := range map[string]int64{"1": 1e9, "0.5": 5e8, ".25": 25e7, "1.": 1e9, "0.000000001": 1, "x": -9, "": -9, "-1": -9, "1.0000000001": -9, "99999999999999": -9, "1.x": -9} {
		got, err := CPUs(in)
		if (err != nil) != (want == -9) || err == nil && got != want {
			t.Errorf("CPUs(%q): %d, %v", in, got, err)
		}
	}
}

func TestRestart(t *testing.T) {
	for in, ok := range map[string]bool{"no": true, "always": true, "unless-stopped": true, "on-failure": true, "on-failure:3": true, "on-failure:x": false, "always:3": false, "sometimes": false, ":3": false, "on-failure:-1": false} {
		if _, err := Restart(in); (err == nil) != ok {
			t.Errorf("%q: %v", in, err)
		}
	}
}

func TestHost(t *testing.T) {
	for in, want := range map[string]string{"a:1.2.3.4": "a:1.2.3.4", "a=1.2.3.4": "a:1.2.3.4", "a:::1": "a:::1", "a=[::1]": "a:::1", "a:host-gateway": "a:host-gateway", "a": "", ":1.2.3.4": "", "a:x": "", "a=": ""} {
		got, err := Host(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestBlockIO(t *testing.T) {
	for in, ok := range map[string]bool{"/dev/sda:100": true, "/dev/sda:0": true, "/dev/sda:9": false, "/dev/sda": false, "sda:100": false, "/dev/sda:x": false} {
		if _, err := WeightDevice(in); (err == nil) != ok {
			t.Errorf("weight %q: %v", in, err)
		}
	}
	if d, err := ThrottleBytes("/dev/sda:1mb"); err != nil || d.Rate != 1<<20 {
		t.Errorf("%v %v", d, err)
	}
	if d, err := ThrottleOps("/dev/sda:100"); err != nil || d.Rate != 100 {
		t.Errorf("%v %v", d, err)
	}
	if _, err := ThrottleOps("/dev/sda:1mb"); err == nil {
		t.Error("a size is no number of operations")
	}
}

func TestEnv(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "env")
	os.WriteFile(file, []byte("\uFEFF# comment\nA=1\n\n  B=two words # kept\nFROM\nUNSET\nC=\n"), 0o600)
	lookup := func(k string) (string, bool) { return "host", k == "FROM" }
	got, err := Env([]string{"A=2", "FROM", "UNSET", "D=x=y"}, []string{file}, lookup)
	want := []string{"A=1", "B=two words # kept", "FROM=host", "C=", "A=2", "FROM=host", "UNSET", "D=x=y"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v", got, err)
	}
	for _, bad := range []string{"=x\n", "a b=c\n", "\xff\xfe=1\n"} {
		os.WriteFile(file, []byte(bad), 0o600)
		if _, err := Env(nil, []string{file}, lookup); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
	if _, err := Env([]string{"=x"}, nil, lookup); err == nil {
		t.Error("a variable without a name: no error")
	}
}

func TestDetachKeys(t *testing.T) {
	for in, want := range map[string]string{"ctrl-p,ctrl-q": "\x10\x11", "a": "a", "ctrl-@": "\x00", "ctrl-[": "\x1b", "ctrl-_,x": "\x1fx"} {
		if got, err := DetachKeys(in); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "ctrl-", "ctrl-1", "ab", "ctrl-ab", "ctrl-A"} {
		if _, err := DetachKeys(in); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func TestTime(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Time{
		"10m":                            now.Add(-10 * time.Minute),
		"1h30m":                          now.Add(-90 * time.Minute),
		"1136073600":                     time.Unix(1136073600, 0),
		"1136073600.5":                   time.Unix(1136073600, 5e8),
		"2006-01-02T15:04:05Z":           time.Date(2006, 1, 2, 15, 4, 5, 0, time.UTC),
		"2006-01-02T15:04:05.000000007Z": time.Date(2006, 1, 2, 15, 4, 5, 7, time.UTC),
		"2006-01-02T15:04:05+01:00":      time.Date(2006, 1, 2, 14, 4, 5, 0, time.UTC),
		"2006-01-02T15:04:05":            time.Date(2006, 1, 2, 15, 4, 5, 0, time.UTC),
		"2006-01-02T15:04":               time.Date(2006, 1, 2, 15, 4, 0, 0, time.UTC),
		"2006-01-02":                     time.Date(2006, 1, 2, 0, 0, 0, 0, time.UTC),
	} {
		if got, err := Time(in, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"", "yesterday", "2006-13-01", "1.x"} {
		if _, err := Time(in, now); err == nil {
			t.Errorf("%q: no error", in)
		}
	}
}

func FuzzNotation(f *testing.F) {
	for _, s := range []string{"8000-8010:80", "[::1]:1:1/udp", "type=bind,src=/a,dst=/b", "a:b:c", "device=0", "name=n,ip=1.2.3.4", "nofile=1:2"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		Ports([]string{s})
		Volume(s, "/h")
		Mount(s, "/h")
		Device(s)
		GPUs(s)
		ReadNetwork(s)
		Ulimit(s)
		Host(s)
		CPUs(s)
		DetachKeys(s)
		DeviceRule(s)
		Time(s, time.Unix(0, 0))
	})
}
