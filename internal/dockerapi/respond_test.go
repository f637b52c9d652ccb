package dockerapi

import (
	"encoding/json"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
)

func TestJSONList(t *testing.T) {
	for _, n := range []int{0, 1, 2, 1000, 20_000} {
		l := make([]map[string]string, n)
		for i := range l {
			l[i] = map[string]string{"a": strings.Repeat("x", i%50), "<b>": "&"}
		}
		rec := httptest.NewRecorder()
		if err := jsonList(&response{ResponseWriter: rec}, 200, l); err != nil {
			t.Fatal(err)
		}
		var got []map[string]string
		if err := json.Unmarshal(rec.Body.Bytes(), &got); err != nil || len(got) != n || n > 0 && !reflect.DeepEqual(got, l) {
			t.Errorf("%d elements: %d came back, %v", n, len(got), err)
		}
		if long := rec.Body.Len() > listPiece; long == (rec.Header().Get("Content-Length") != "") {
			t.Errorf("%d bytes with length %q", rec.Body.Len(), rec.Header().Get("Content-Length"))
		}
		if strings.Contains(rec.Body.String(), `\u003c`) {
			t.Error("text is escaped for HTML")
		}
	}
}
