package engine

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/store"
)

func BenchmarkContainerList(b *testing.B) {
	e := &Engine{units: map[string]*unit{}, names: store.NewNames()}
	for i := range 1100 {
		r := record(fmt.Sprintf("web%d", i), func(r *container.Record) {
			r.ID = fmt.Sprintf("%064x", i)
			r.Created = time.Unix(int64(i), 0)
			r.Config.Labels = map[string]string{"n": fmt.Sprint(i)}
			r.Config.ExposedPorts = network.PortSet{network.MustParsePort("80/tcp"): {}}
			r.Endpoints = map[string]*network.EndpointSettings{"bridge": {}}
			if i%11 == 0 {
				r.Attached = map[string]*network.EndpointSettings{"bridge": {NetworkID: "abcdef", IPAddress: netip.MustParseAddr("172.17.0.2"), Gateway: netip.MustParseAddr("172.17.0.1"), IPPrefixLen: 16}}
			}
		})
		e.units[r.ID] = e.newUnit(r)
	}
	b.Run("list", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if l, err := e.ContainerList(context.Background(), ListOptions{All: true}); err != nil || len(l) != 1100 {
				b.Fatal(len(l), err)
			}
		}
	})
	l, _ := e.ContainerList(context.Background(), ListOptions{All: true})
	b.Run("encode", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_ = json.NewEncoder(io.Discard).Encode(l)
		}
	})
}
