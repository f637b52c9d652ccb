package client

import (
	"encoding/json"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"testing"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/blkiodev"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
)

func fullRun() *api.RunRequest {
	yes, ten, three := true, int64(10), 3
	port, _ := network.PortFrom(80, "tcp")
	return &api.RunRequest{
		Name: "n\"\\\x01é\u2028<", Stdin: true, Extra: api.CreateExtra{PublishThrough: true},
		Config: &container.Config{Image: "i", Cmd: []string{}, Env: []string{"A=b", ""}, Entrypoint: []string{""}, Tty: true, StopTimeout: &three,
			Healthcheck:  &container.HealthConfig{Test: []string{"CMD", "x"}, Interval: 30 * time.Second},
			ExposedPorts: network.PortSet{port: {}}, Volumes: map[string]struct{}{"/v": {}}, Labels: map[string]string{"a": "b"}},
		HostConfig: &container.HostConfig{
			Binds: []string{"/a:/b"}, AutoRemove: true, NetworkMode: "none", ConsoleSize: [2]uint{24, 80}, Init: &yes,
			PortBindings:  network.PortMap{port: {{HostIP: netip.MustParseAddr("::1"), HostPort: "8080"}, {}}},
			DNS:           []netip.Addr{netip.MustParseAddr("1.1.1.1")},
			RestartPolicy: container.RestartPolicy{Name: "on-failure", MaximumRetryCount: 3},
			MaskedPaths:   []string{}, Tmpfs: map[string]string{"/t": ""},
			Mounts: []mount.Mount{{Type: "tmpfs", Target: "/t", TmpfsOptions: &mount.TmpfsOptions{Mode: 0o1777, Options: [][]string{{"a", "b"}, {"c"}}}}},
			Resources: container.Resources{Memory: 1 << 40, NanoCPUs: 15e8, PidsLimit: &ten, MemorySwappiness: new(int64),
				Ulimits:           []*units.Ulimit{{Name: "nofile", Hard: 2, Soft: 1}},
				BlkioWeightDevice: []*blkiodev.WeightDevice{{Path: "/dev/sda", Weight: 10}},
				DeviceRequests:    []container.DeviceRequest{{Count: -1, Capabilities: [][]string{{"gpu"}}}}},
		},
		Networking: &network.NetworkingConfig{EndpointsConfig: map[string]*network.EndpointSettings{
			"n": {IPAMConfig: &network.EndpointIPAMConfig{IPv4Address: netip.MustParseAddr("10.0.0.2")}, Aliases: []string{"a"}, MacAddress: network.HardwareAddr{2, 0, 0, 0, 0, 1}},
			"m": nil,
		}},
	}
}

// roundTrip checks that the engine would decode the same from both encodings.
func roundTrip[T any](t *testing.T, v T) {
	t.Helper()
	ours, err := encodeBody(v)
	if err != nil {
		t.Fatal(err)
	}
	std, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	var a, b T
	if err := json.Unmarshal(ours, &a); err != nil {
		t.Fatalf("%v in %s", err, ours)
	}
	if err := json.Unmarshal(std, &b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Fatalf("ours %s\nstd  %s", ours, std)
	}
}

func TestEncodeBody(t *testing.T) {
	roundTrip(t, fullRun())
	roundTrip(t, &api.RunRequest{})
	roundTrip(t, container.CreateRequest{Config: fullRun().Config, HostConfig: fullRun().HostConfig})
	roundTrip(t, container.CreateRequest{})
	roundTrip(t, container.UpdateConfig{Resources: container.Resources{Memory: 5}})
	roundTrip(t, network.CreateRequest{Name: "x", EnableIPv6: new(bool), IPAM: &network.IPAM{Config: []network.IPAMConfig{{Subnet: netip.MustParsePrefix("10.0.0.0/8"), AuxAddress: map[string]netip.Addr{"a": netip.MustParseAddr("10.1.1.1")}}}}})
	roundTrip(t, volume.CreateRequest{Name: "v", DriverOpts: map[string]string{}})
	roundTrip(t, registry.AuthConfig{Username: "u"})
	roundTrip(t, container.ExecCreateRequest{ConsoleSize: &[2]uint{1, 2}, Cmd: []string{"a"}})
	roundTrip(t, api.PruneRequest{Filters: map[string]map[string]bool{"a": {"b": true}}})
	roundTrip(t, map[string]any{"a": []byte("xyz"), "b": 1.5, "c": nil})
}

// Random requests, so that a field that a new version of the types brings along
// is covered.
func TestEncodeBodyRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		v := &api.RunRequest{Config: &container.Config{}, HostConfig: &container.HostConfig{}}
		fill(r, reflect.ValueOf(v).Elem(), 0)
		roundTrip(t, v)
	}
}

// fill sets fields at random, those whose types check their text left out.
func fill(r *rand.Rand, v reflect.Value, depth int) {
	if depth > 6 || v.Type() == reflect.TypeFor[network.PortMap]() || v.Type() == reflect.TypeFor[network.PortSet]() || v.Type() == reflect.TypeFor[network.HardwareAddr]() ||
		v.Type() == reflect.TypeFor[netip.Addr]() || r.IntN(4) == 0 {
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true)
	case reflect.String:
		v.SetString([]string{"x", "", "<&>", "\x7f\n"}[r.IntN(4)])
	case reflect.Int, reflect.Int64:
		v.SetInt(r.Int64N(100) - 50)
	case reflect.Uint, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(r.Uint64N(100))
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(r, v.Elem(), depth+1)
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() {
				fill(r, v.Field(i), depth+1)
			}
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), r.IntN(3), 3))
		for i := range v.Len() {
			fill(r, v.Index(i), depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range r.IntN(3) {
			k, x := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(r, k, depth+1)
			fill(r, x, depth+1)
			v.SetMapIndex(k, x)
		}
	}
}
